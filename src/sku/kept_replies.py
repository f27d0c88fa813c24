"""What models said and what is kept of it in folders: found by content, listed without a word of it, and removed.

Four kinds. Folders of own replies (``sku data own``, and ``own/`` of a run, in ``$SKU_CACHE`` where the run's manifest
says so); what an interrupted call left of one, hidden beside it; rows of evaluations and attacks that hold prompts and
replies, finished or on their way; and what was made from these, a report and training rows that were mixed. Figures,
and outcomes and verdicts by hash, hold no text and stay.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
_ROWS = (".jsonl", ".jsonl.partial")
_OWN_INPUTS = {"model", "prompts", "judge", "wordings"}
"""What an unfinished folder of own replies was begun from, among others."""


class KeptReplies(NamedTuple):
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
    paths = {*root.parent.glob(f".{glob.escape(root.name)}.partial-*"), root, *root.rglob("*")}
    for manifest in [path for path in paths if path.name == _MANIFEST]:
        if "folder" in (own := _own_of(manifest.parent)):
            paths.add(Path(str(own["folder"])))
    found = {path: what for path in paths if (what := _what(path))}
    if not root.is_dir() and not found:
        raise OutputError(f"there is no folder {root}, and nothing that an interrupted sku data own left beside it")
    return [_place(path, found[path]) for path in sorted(found) if found.keys().isdisjoint(path.parents)]


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


def _what(path: Path) -> str | None:
    """What a file or folder holds of replies; of a folder whose removal was killed, what it held."""
    if path.is_symlink():
        return None
    if path.is_dir():
        if isinstance(_read(path / ACCOUNT_FILE).get("kinds"), dict):
            return "own replies"
        # ``sku negate`` leaves such folders too, of weights.
        unfinished = path.match(".*.partial-*") and _read(path / _INPUTS_FILE).keys() >= _OWN_INPUTS
        return "own replies of an interrupted call" if unfinished else None
    if path.name == REPORT_FILE:
        return "report" if "recipe" in _read(path.parent / _MANIFEST) else None
    if path.name == MIXED_FILE and "mixed" in _own_of(path.parent):
        return "own replies among the training rows"
    return "replies of an evaluation" if path.name.endswith(_ROWS) and _has_replies(path) else None


def _has_replies(path: Path) -> bool:
    """Whether a file, finished or not, has a header and rows with a reply, or with what prefills begin with."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            header, first = (json.loads(file.readline()) for _ in range(2))
        return "schema_version" in header and not {"reply", "text"}.isdisjoint(first)
    except (OSError, ValueError, TypeError):
        return False  # None with rows, or another program's.


def _place(path: Path, what: str) -> KeptReplies:
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.name.endswith(_ROWS) and file.name != "verdicts.jsonl"]
        return KeptReplies(path, what, sum(map(_lines, files)), bytes_in(path))
    texts = None if path.name == REPORT_FILE else _lines(path) - (path.name != MIXED_FILE)
    return KeptReplies(path, what, texts, path.stat().st_size)


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _own_of(run: Path) -> dict[str, Any]:
    """What a run's manifest says of its own replies."""
    noted = _read(run / _MANIFEST).get("own_replies")
    return noted if isinstance(noted, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
