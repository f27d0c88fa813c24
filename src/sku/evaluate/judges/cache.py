"""Verdicts that were paid for once: kept on disk by a hash of judge and text, so that a killed run goes on.

A line holds a hash and a verdict, no text. Errors are not kept, so the next run asks again for those alone.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

from sku.errors import EvaluationError
from sku.evaluate.judges import Judge, JudgeCard, Verdict, verdicts_of
from sku.evaluate.records import GenerationRecord, create_private_folder, from_plain, header_hash, json_lines
from sku.storage import named_disk_errors

CACHE_FILE = "verdicts.jsonl"
CACHE_VARIABLE = "SKU_JUDGE_CACHE"
"""Environment variable: a folder whose cache all evaluations share, in place of one in each output folder."""
CHUNK = 32
"""Records between two writes: what a killed run loses at most."""
KEYED = frozenset({"prompt", "prefill", "reply"})
"""Fields that the hash covers."""

Progress = Callable[[int, int], None]


@runtime_checkable
class Announcing(Protocol):
    """A judge that says beforehand what asking it takes, and afterwards what it took."""

    def announce(self, records: Sequence[GenerationRecord]) -> None:
        """Called once with all records that will be asked about."""

    def sum_up(self) -> None:
        """Called when they have been."""


def cached(judge: Judge, folder: Path | None, progress: Progress | None = None) -> Judge:
    """Puts a cache before a judge that is worth one.

    Args:
        judge: Rules and labels of people cost nothing and are left as they are (``is_cacheable``).
        folder: For ``verdicts.jsonl``, unless the variable ``SKU_JUDGE_CACHE`` names another; without both, verdicts
            are kept in memory only.
        progress: Called after each chunk with the number of records judged and their total.

    Returns:
        A judge that gives the same verdicts.

    Raises:
        EvaluationError: A cache file is damaged.
        OutputError: The folder of the variable can't be made, or the file can't be written.
    """
    if not is_cacheable(judge.card):
        return judge
    shared = os.environ.get(CACHE_VARIABLE)
    if shared:
        folder = Path(shared)
        create_private_folder(folder)
    return CachedJudge(judge, None if folder is None else folder / CACHE_FILE, progress)


def is_cacheable(card: JudgeCard) -> bool:
    """Whether a judge has weights, leaves the machine or may change its mind, and reads nothing but the text."""
    return set(card.needs) <= KEYED and not (card.offline and card.deterministic and card.revision is None)


class CachedJudge:
    """Asks the judge only about texts that it has not judged yet."""

    def __init__(self, inner: Judge, path: Path | None, progress: Progress | None = None) -> None:
        """Reads what is there.

        Args:
            inner: The judge; its card must name no fields but those in ``KEYED``.
            path: The file, made at the first verdict; None to keep verdicts in memory.
            progress: As in ``cached``.

        Raises:
            EvaluationError: The file is damaged elsewhere than in a last line that a killed run broke off.
        """
        self.inner = inner
        self.card: JudgeCard = inner.card
        self._path = path
        self._progress = progress
        self._known: dict[str, Verdict] = {} if path is None else _read(path)

    def judge(self, records: Sequence[GenerationRecord]) -> list[Verdict]:
        """One verdict per record, in order; equal texts are asked about once.

        Raises:
            EvaluationError: Whatever the judge raises, or verdicts that don't match the records.
            OutputError: The file can't be written; the disk is full, say.
        """
        keys = [self._key(record) for record in records]
        waiting = [*{key: record for key, record in zip(keys, records, strict=True) if key not in self._known}.items()]
        failed: dict[str, Verdict] = {}
        if waiting and isinstance(self.inner, Announcing):
            self.inner.announce([record for _, record in waiting])
        self._show(keys, failed)
        for start in range(0, len(waiting), CHUNK):
            chunk = dict(waiting[start : start + CHUNK])
            fresh = dict(zip(chunk, verdicts_of(self.inner, list(chunk.values())), strict=True))
            failed |= {key: verdict for key, verdict in fresh.items() if verdict.label == "error"}
            kept = {key: verdict for key, verdict in fresh.items() if verdict.label != "error"}
            self._known |= kept
            if self._path is not None and kept:
                _append(self._path, kept)
            self._show(keys, failed)
        if waiting and isinstance(self.inner, Announcing):
            self.inner.sum_up()
        return [
            dataclasses.replace(self._known.get(key) or failed[key], id=record.id)
            for key, record in zip(keys, records, strict=True)
        ]

    def _key(self, record: GenerationRecord) -> str:
        return header_hash([self.card.key, record.prompt, record.whole_reply])

    def _show(self, keys: Sequence[str], failed: Collection[str]) -> None:
        if self._progress is not None and keys:
            self._progress(sum(key in self._known or key in failed for key in keys), len(keys))


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The file to read and to append to, open to one process at a time: several may share a cache."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _append(path: Path, verdicts: Mapping[str, Verdict]) -> None:
    lines = json_lines(dataclasses.replace(verdict, id=key) for key, verdict in verdicts.items())
    with named_disk_errors(path), _locked(path) as file:
        file.write(lines.encode("utf-8", "surrogatepass"))
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> dict[str, Verdict]:
    """All verdicts of a file; a last line that a killed run broke off is removed."""
    if not path.exists():
        return {}
    try:
        with _locked(path) as file:
            file.seek(0)
            content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            file.truncate(len(whole))
    except OSError as error:
        raise EvaluationError(f"{path} can't be read: {error.strerror}") from None
    verdicts = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            entry = from_plain(Verdict, json.loads(line), "")
        except (ValueError, EvaluationError):
            raise EvaluationError(
                f"{path} line {number} is no verdict: the cache is damaged. Remove the file, and the judge is asked "
                "anew"
            ) from None
        verdicts[entry.id] = entry
    return verdicts
