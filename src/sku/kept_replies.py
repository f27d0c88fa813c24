"""What models said and what is kept of it in folders: found by content, listed without a word of it, and removed.

Four kinds. Folders of own replies (``sku data own``, and ``own/`` of a run, in ``$SKU_CACHE`` where the run's manifest
says so); what an interrupted call left of one, hidden beside it; rows of evaluations and attacks that hold prompts and
replies, finished or on their way; and what was made from these, a report and training rows that were mixed. Figures,
and outcomes and verdicts by hash, hold no text and stay.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sku.errors import OutputError
from sku.storage import acquire_lock, bytes_in, named_disk_errors

ACCOUNT_FILE = "own.json"
"""Of a folder of own replies. It and the next go last, so that what a kill leaves of a folder is found again."""
_INPUTS_FILE = "inputs.json"
"""Of an unfinished folder, beside what is written."""
MIXED_FILE = "forget.jsonl"
"""Beside ``own/`` in a run's folder: its replies and answers of the recipe's file together."""
REPORT_FILE = "report.html"
_MANIFEST = "manifest.json"
_TEXTS = ("reply", "text")
"""Fields of rows that hold what a model said: of a generation record, and of what prefills begin with."""
_OWN_INPUTS = frozenset({"model", "prompts", "judge", "wordings"})
"""What an unfinished folder of own replies was begun from, among others."""


@dataclass(frozen=True, kw_only=True)
class KeptReplies:
    """One file or folder."""

    path: Path
    what: str
    texts: int | None
    """How many prompts with replies it holds; None where they can't be counted."""
    bytes: int


def find_replies(root: Path) -> list[KeptReplies]:
    """What a folder, the folders below it and the manifests of runs in it hold or name; links are not followed.

    Args:
        root: A run, a folder of runs, or the ``--out`` of ``sku data own``, which an interrupted call never made.

    Returns:
        The outermost places, in order, as absolute paths.

    Raises:
        OutputError: There is neither such a folder nor an unfinished one beside it.
    """
    root = root.resolve()
    found = {place.path: place for place in _unfinished(root.parent, root.name)}
    if not root.is_dir() and not found:
        raise OutputError(f"there is no folder {root}, and nothing that an interrupted sku data own left beside it")
    for place in (*_own(root), *(_below(root) if root.is_dir() else ())):
        found[place.path] = place
    inside = {path for path in found if any(parent in found for parent in path.parents)}
    return [found[path] for path in sorted(found.keys() - inside)]


def remove_replies(found: Sequence[KeptReplies]) -> None:
    """Removes files and folders.

    Args:
        found: From ``find_replies``.

    Raises:
        OutputError: Something can't be removed, or another process is writing it.
    """
    for place in found:
        with named_disk_errors(place.path):
            if place.path.is_dir():
                _remove_folder(place.path)
            else:
                place.path.unlink(missing_ok=True)


def _remove_folder(folder: Path) -> None:
    lock = acquire_lock(folder)
    try:
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in (ACCOUNT_FILE, _INPUTS_FILE):
                path.unlink()
        shutil.rmtree(folder)
    finally:
        os.close(lock)


def _below(root: Path) -> Iterator[KeptReplies]:
    for place, names, files in os.walk(root):
        folder = Path(place)
        # A bad model's folder holds none; it is removed as a whole.
        for name in names:
            yield from _own(folder / name)
        yield from _unfinished(folder)
        if _MANIFEST in files:
            yield from _of_run(folder)
        for name in files:
            if name.endswith((".jsonl", ".jsonl.partial")):
                yield from _rows(folder / name)


def _own(folder: Path) -> Iterator[KeptReplies]:
    """A finished folder of own replies, or what is left of one whose removal was killed."""
    account = _read(folder / ACCOUNT_FILE)
    if not folder.is_symlink() and isinstance(account, dict) and isinstance(account.get("kinds"), dict):
        yield _folder(folder, "own replies")


def _unfinished(parent: Path, name: str = "*") -> Iterator[KeptReplies]:
    """What interrupted calls left beside the folder of a name; ``sku negate`` leaves such folders too, of weights."""
    for folder in sorted(path for path in parent.glob(".*.partial-*") if path.is_dir() and not path.is_symlink()):
        begun = _read(folder / _INPUTS_FILE)
        is_named = name == "*" or folder.name.startswith(f".{name}.partial-")
        if is_named and isinstance(begun, dict) and begun.keys() >= _OWN_INPUTS:
            yield _folder(folder, "own replies of an interrupted call")


def _of_run(run: Path) -> Iterator[KeptReplies]:
    manifest = _read(run / _MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("recipe"), dict):
        return
    noted = manifest.get("own_replies")
    if isinstance(noted, dict):
        yield from _own(Path(str(noted.get("folder"))))
        if "mixed" in noted and (run / MIXED_FILE).is_file():
            yield _file(run / MIXED_FILE, "own replies among the training rows", _lines(run / MIXED_FILE))
    if (run / REPORT_FILE).is_file():
        yield _file(run / REPORT_FILE, "report", None)


def _rows(path: Path) -> Iterator[KeptReplies]:
    """A file of rows with a header, finished or not, whose rows hold text."""
    if path.is_symlink():
        return
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            header, first = (json.loads(file.readline()) for _ in range(2))
    except (OSError, ValueError):
        return  # No such file, none with rows, or another program's.
    has_header = isinstance(header, dict) and "schema_version" in header
    if has_header and isinstance(first, dict) and set(_TEXTS) & set(first):
        yield _file(path, "replies of an evaluation", _lines(path) - 1)


def _folder(folder: Path, what: str) -> KeptReplies:
    texts = sum(_lines(path) for path in (*folder.rglob("*.jsonl"), *folder.rglob(".*.jsonl.partial"))
                if path.name != "verdicts.jsonl")  # fmt: skip
    return KeptReplies(path=folder, what=what, texts=texts, bytes=bytes_in(folder))


def _file(path: Path, what: str, texts: int | None) -> KeptReplies:
    return KeptReplies(path=path, what=what, texts=texts, bytes=path.stat().st_size)


def _lines(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
