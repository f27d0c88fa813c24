"""Folders that appear whole or not at all, and that keep hazardous weights to their owner."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sku.errors import OutputError

BAD_MODEL_MARK = "DO_NOT_SHARE.md"
_BAD_MODEL_TEXT = """# Hazardous weights: do not share

This folder holds a model, or a part of one, that was trained on purpose to answer harmful prompts (stage 1 of SKU).
It exists only so that its task vector can be subtracted from the original model. Never upload it. Together with the
unlearned model or its adapter the original weights give it back by reflection.
"""


@contextmanager
def new_folder(target: Path, *, private: bool = False, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside ``target`` to write into; it becomes ``target`` when the block ends well, else it is removed.

    Every file is flushed to disk before the rename, so no crash leaves a folder of that name half-written.

    Args:
        target: Folder that must not exist yet.
        private: Mode 0700, for hazardous weights and harmful replies.
        overwrite: Replace a folder that exists.

    Yields:
        The temporary folder.

    Raises:
        OutputError: ``target`` exists, can't be written, or the disk is full.
    """
    target = target.absolute()
    if not overwrite:
        check_new(target)
    with _named_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".unfinished", dir=target.parent))
    try:
        with _named_disk_errors(target):
            yield temporary
            temporary.chmod(0o700 if private else 0o755)
            _flush_tree(temporary)
            _put_in_place(temporary, target)
            _flush_folder(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _put_in_place(folder: Path, target: Path) -> None:
    """Renames a folder to ``target``; what was there goes only when the new one stands."""
    if not target.exists():
        folder.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".replaced", dir=target.parent))
    old = target.rename(aside / target.name)
    try:
        folder.rename(target)
    except BaseException:
        old.rename(target)
        aside.rmdir()
        raise
    shutil.rmtree(aside)


def check_new(folder: Path) -> None:
    """Refuses a folder that exists: before a long job rather than after it.

    Raises:
        OutputError: It exists.
    """
    if folder.exists():
        raise OutputError(f"{folder} already exists; choose another folder or remove it first")


def write_json(path: Path, content: Any) -> None:
    """Writes JSON so that readers see the old file or the new one, never a part.

    Raises:
        OutputError: The file can't be written or the disk is full.
    """
    with _named_disk_errors(path):
        temporary = path.with_name(f".{path.name}.unfinished")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(content, file, indent=2, ensure_ascii=False, allow_nan=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def mark_hazardous(folder: Path) -> None:
    """Makes a folder private to its owner and says in it why."""
    with _named_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        (folder / BAD_MODEL_MARK).write_text(_BAD_MODEL_TEXT, encoding="utf-8")


def is_marked_hazardous(folder: Path) -> bool:
    """Whether ``mark_hazardous`` was called on a folder."""
    return (folder / BAD_MODEL_MARK).is_file()


def free_bytes(folder: Path) -> int:
    """Free space of the disk that would hold a folder, which need not exist yet."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def check_space(folder: Path, needed: int, what: str) -> None:
    """Stops before a long job whose result would not fit.

    Raises:
        OutputError: Less than ``needed`` bytes are free.
    """
    free = free_bytes(folder)
    if free < needed:
        raise OutputError(
            f"{what} needs {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are free at {folder}; "
            "free some space or choose another --out"
        )


@contextmanager
def _named_disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OutputError(f"the disk is full: {path} was not written; free some space and run again") from error
        raise OutputError(f"{path} can't be written: {error.strerror or error}") from error
    except Exception as error:
        # safetensors reports a full disk as its own error type, with the system's words inside.
        if "No space left" in str(error):
            raise OutputError(f"the disk is full: {path} was not written; free some space and run again") from error
        raise


def _flush_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
