"""Folders that appear whole or not at all, that one process writes at a time, and that keep hazardous weights private.

Where a file system has no locks (some network disks), nothing is locked and nothing counts as abandoned.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sku.errors import OutputError

RECORD_VERSION = 6
"""``schema_version`` of every file that this SKU writes for itself to read."""
LOCK_FILE = ".lock"
"""Lies in a folder that one process writes for long; what a killed one leaves of it holds nobody up."""
BAD_MODEL_MARK = "DO_NOT_SHARE.md"
HAZARD_KEY = "sku_hazardous"
"""Set to true in ``config.json`` and ``adapter_config.json`` of a bad model: it stays when the folder is copied."""
_CONFIG_FILES = ("config.json", "adapter_config.json")
_BAD_MODEL_TEXT = """# Hazardous weights: do not share

This folder holds a model, or a part of one, that was trained on purpose to answer harmful prompts (stage 1 of SKU).
It exists only so that its task vector can be subtracted from the original model. Never upload it. Together with the
unlearned model or its adapter the original weights give it back by reflection.
"""
_FULL = ("No space left", "Disk quota exceeded", "File too large")
"""The system's words, which safetensors quotes."""


def new_folder(target: Path, *, private: bool = False) -> AbstractContextManager[Path]:
    """A folder beside ``target`` to write into; it becomes ``target`` when the block ends well, else it is removed.

    Every file is flushed to disk before the rename, so no crash leaves a folder of that name half-written. What a
    killed call left beside ``target`` is removed by the next one.

    Args:
        target: Folder that must not exist yet.
        private: Mode 0700, for hazardous weights and harmful replies.

    Returns:
        Gives the temporary folder.

    Raises:
        OutputError: ``target`` exists, before the block or after it, can't be written, or the disk is full.
    """
    return _written_beside(target, _open_temporary, private=private)


@contextmanager
def _written_beside(
    target: Path, open_place: Callable[[Path], tuple[Path, Path, int]], *, private: bool,
    stays_after: tuple[type[BaseException], ...] = (),
) -> Iterator[Path]:  # fmt: skip
    """Opens a folder, which becomes ``target`` when the block ends well.

    It is the place that ``open_place`` made, or lies in it. The place, which is owned by an open file, the lock, goes
    then, and after errors that ``stays_after`` doesn't name.
    """
    target = target.absolute()
    check_new(target)
    with named_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder, place, lock = open_place(target)
    stays = False
    try:
        with named_disk_errors(target):
            yield folder
            folder.chmod(0o700 if private else 0o755)
            _flush(*(path for path in folder.rglob("*") if path.exists()), folder)
            check_new(target)  # Another process may have made it meanwhile.
            folder.rename(target)
            _flush(target.parent)
    except stays_after:
        stays = True
        raise
    finally:
        if not stays:
            shutil.rmtree(place, ignore_errors=True)
        os.close(lock)


def _open_temporary(target: Path) -> tuple[Path, Path, int]:
    """A new folder beside ``target``, and the open file by which this process owns it; abandoned ones are removed."""
    with one_at_a_time(target.parent):
        for other in target.parent.glob(f"{glob.escape(f'.{target.name}.')}*.unfinished"):
            with suppress(OSError):  # It is somebody's, no folder, or gone.
                os.close(acquire_lock(other, without_locks=False))
                shutil.rmtree(other)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".unfinished", dir=target.parent))
        try:
            return temporary, temporary, acquire_lock(temporary)
        except BaseException:
            temporary.rmdir()
            raise


def resumable_folder(
    target: Path,
    inputs: Mapping[str, Any],
    *,
    resume: bool = False,
    private: bool = False,
    stays_after: tuple[type[BaseException], ...] = (KeyboardInterrupt,),
) -> AbstractContextManager[Path]:
    """A folder beside ``target`` to write a large result into, which outlives a kill and is gone on with later.

    What is written lies in ``.NAME.partial-KEY/model`` and becomes ``target`` by one rename when the block ends well.
    After a kill or an interrupt it stays, so that the same call with ``resume`` finds it; after an error that
    ``stays_after`` does not name, and when a call without ``resume`` starts anew, it is removed.

    Args:
        target: Folder that must not exist yet.
        inputs: What decides the result, as plain data; what was begun from other inputs is not gone on with.
        resume: Go on with what an earlier call left, if it left something.
        private: Mode 0700, for harmful text.
        stays_after: Errors after which what was written stays.

    Returns:
        Gives the folder to write into. The folder around it may keep a file that says what is finished.

    Raises:
        OutputError: ``target`` exists or can't be written, another process is writing it, or with ``resume`` what was
            left there is of other inputs.
    """
    open_partial = partial(_open_partial, inputs=inputs, resume=resume)
    return _written_beside(target, open_partial, private=private, stays_after=stays_after)


def _open_partial(target: Path, inputs: Mapping[str, Any], *, resume: bool) -> tuple[Path, Path, int]:
    """The folder that holds an unfinished ``target``, and the open file by which this process owns it."""
    text = json.dumps(inputs, indent=2, sort_keys=True)
    place = target.with_name(f".{target.name}.partial-{sha256(text.encode()).hexdigest()[:12]}")
    with one_at_a_time(target.parent):  # Two calls must not find the same folder at once.
        for other in sorted(target.parent.glob(f"{glob.escape(f'.{target.name}.partial-')}*")):
            os.close(acquire_lock(other))
            if not resume:
                shutil.rmtree(other)
            elif other != place:
                before, now = _read_dict(other / "inputs.json"), json.loads(text)
                changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
                raise OutputError(
                    f"{other} was begun with other inputs or options ({', '.join(changed)}); use those again, or "
                    "leave --resume out to remove it and start anew"
                )
        place.mkdir(mode=0o700, exist_ok=True)
        (place / "model").mkdir(mode=0o700, exist_ok=True)
        (place / "inputs.json").write_text(text, encoding="utf-8")
        return place / "model", place, acquire_lock(place)


def _read_dict(path: Path) -> dict[str, Any]:
    """What a JSON file holds; empty where it can't be read, of which whoever needs it tells."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def named_disk_errors(path: Path) -> Iterator[None]:
    """Turns errors of the system into one that names a file or folder.

    Args:
        path: What is written in the block.

    Raises:
        OutputError: In place of an ``OSError``, or of an error by which safetensors hides one.
    """
    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        words = getattr(error, "strerror", None) or str(error)
        # safetensors reports the system's error as one of its own type, with the system's words inside.
        if isinstance(error, SafetensorError) and "I/O error" not in words:
            raise
        if any(full in words for full in _FULL):
            words = "the disk is full; free some space and run again"
        raise OutputError(f"{path} can't be written: {words}") from error


def acquire_lock(place: Path, *, by_file: bool = False, without_locks: bool = True) -> int:
    """Makes a folder or a file, which must be there, this process's own until ``os.close`` of what is returned.

    Args:
        place: What is locked.
        by_file: By ``LOCK_FILE`` in it, with mode 0600, which is made where there is none, and stays.
        without_locks: Succeed where the file system has no locks.

    Raises:
        OutputError: Another process, or another call in this one, owns it.
        OSError: It can't be opened.
    """
    made = os.O_RDWR | os.O_CREAT
    descriptor = os.open(place / LOCK_FILE, made, 0o600) if by_file else os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if without_locks and not isinstance(error, BlockingIOError):
            return descriptor
        os.close(descriptor)
        raise OutputError(f"another process is writing {place}; wait until it ends") from None
    return descriptor


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Waits until no other process is in such a block for the same folder.

    Raises:
        OSError: The folder can't be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def check_new(folder: Path) -> None:
    """Refuses a folder that exists or could not be made: before a long job rather than after it.

    Raises:
        OutputError: It exists, or as ``check_can_be_made``.
    """
    check_place(folder)
    if folder.exists() or folder.is_symlink():
        raise OutputError(f"{folder} already exists; choose another folder or remove it first")
    check_can_be_made(folder)


def check_can_be_made(folder: Path) -> None:
    """Refuses a folder that could not be made or written to, without making it.

    Raises:
        OutputError: A file stands in its way, or this user may not write there.
    """
    existing = _existing(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = errno.EACCES if existing.is_dir() else errno.ENOTDIR
        raise OutputError(f"{folder} can't be written: {os.strerror(reason)}")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one around it that is there."""
    check_place(folder)
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def check_place(folder: Path) -> None:
    """Refuses a name that no folder can have.

    Raises:
        OutputError: It is too long, holds a NUL, or leads through links in a circle.
    """
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return  # Whoever makes it finds out whether that can be.
    except (OSError, ValueError) as error:
        raise OutputError(f"{str(folder)!r} can't be written: {getattr(error, 'strerror', None) or error}") from None


def write_json(path: Path, content: Any) -> None:
    """Writes JSON so that readers see the old file or the new one, never a part.

    Raises:
        OutputError: The file can't be written or the disk is full.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_private_text(path: Path, text: str) -> None:
    """``write_text`` with mode 0600, lone surrogates too."""
    write_text(path, text, mode=0o600)


def write_text(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Writes text so that readers see the old file or the new one, never a part.

    It is written under a name of this process alone, then renamed; ``mode`` is less what the umask takes away.

    Raises:
        OutputError: The file can't be written or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    with named_disk_errors(path):
        try:
            temporary.unlink(missing_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogatepass", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def mark_hazardous(folder: Path) -> None:
    """Makes a folder private to its owner, says in it why, and sets ``HAZARD_KEY`` in a model's configuration.

    Args:
        folder: Is made if it doesn't exist. Mark it before weights are written, and again after, for the key.

    Raises:
        OutputError: It can't be written, or a configuration in it is damaged.
    """
    with named_disk_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        (folder / BAD_MODEL_MARK).write_text(_BAD_MODEL_TEXT, encoding="utf-8")
    for name in _CONFIG_FILES:
        path = folder / name
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise OutputError(f"{path} can't be marked as hazardous: {error}") from error
            write_json(path, {**content, HAZARD_KEY: True})


def is_marked_hazardous(folder: Path) -> bool:
    """Whether a folder, or the one around it, was marked by ``mark_hazardous``, or a configuration in it was."""
    if any((place / BAD_MODEL_MARK).is_file() for place in (folder, folder.absolute().parent)):
        return True
    return any(bool(_read_dict(folder / name).get(HAZARD_KEY)) for name in _CONFIG_FILES)


def remove_hazardous(folder: Path) -> None:
    """Removes a folder of hazardous weights, and says so where it could not.

    It is renamed first, so that no kill leaves a part of it under its name, and marks go last, so that what one leaves
    is still found as hazardous. What was on the disk may still be read there: blocks are freed, not overwritten
    (SECURITY.md).

    Raises:
        OutputError: Something of it is left.
    """
    if not folder.exists():
        return
    folder = folder.resolve()  # "." has no name that could be changed.
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.removed")
    try:
        with suppress(OSError):  # A full disk may have no room for another name.
            folder.rename(aside)
        _remove_marks_last(aside if aside.exists() else folder)
    except KeyboardInterrupt:  # Nobody who interrupts wants them to stay.
        for left in (aside, folder):
            if left.exists():
                _remove_marks_last(left)
        raise
    except OSError as error:
        with suppress(OSError):
            aside.rename(folder)
        raise OutputError(
            f"hazardous weights in {folder} could not be removed: {error.strerror or error}; remove them yourself"
        ) from error


def _remove_marks_last(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            _remove_marks_last(path)
        elif path.name != BAD_MODEL_MARK:
            path.unlink()
    shutil.rmtree(folder)


def hazardous_folders(root: Path) -> list[Path]:
    """Folders that are marked as hazardous, at a place and below it; links are not followed.

    Args:
        root: A run, a folder of runs, or a bad model itself.

    Returns:
        The outermost ones, in order, as absolute paths.

    Raises:
        OutputError: There is no such folder.
    """
    if not root.is_dir():
        raise OutputError(f"there is no folder {root}; give a run, a folder of runs, or a bad model")
    root = root.resolve()  # So that "." has a name, and a run's manifest beside it.
    if is_marked_hazardous(root):
        return [root]
    found = []
    for place, names, _ in os.walk(root):
        marked = {
            name for name in names if is_marked_hazardous(Path(place, name)) and not Path(place, name).is_symlink()
        }
        found += [Path(place, name) for name in marked]
        names[:] = [name for name in names if name not in marked]
    return sorted(found)


def wipe(folders: Sequence[Path]) -> None:
    """Removes marked folders, and notes in the manifests of their runs that the bad model is gone.

    Args:
        folders: From ``hazardous_folders``.

    Raises:
        OutputError: A folder is not marked, or something of it is left.
    """
    for folder in [folder.resolve() for folder in folders]:  # Before any is gone: this process may stand in it.
        if not is_marked_hazardous(folder):
            raise OutputError(f"{folder} is not marked as hazardous: nothing of it was removed")
        remove_hazardous(folder)
        manifest = folder.parent / "manifest.json"
        content = _read_dict(manifest)
        if "bad_model" in content:
            write_json(manifest, {**content, "bad_model": {"kept": False}})


def remove_left_behind(folder: Path) -> None:
    """Removes what killed calls of this module left below a folder, which must be this process's own.

    Raises:
        OutputError: Something can't be removed.
    """
    with named_disk_errors(folder):
        for ending in ("unfinished", "removed"):
            for path in list(folder.rglob(f".*.{ending}")):
                if path.is_dir() and not path.is_symlink():
                    _remove_marks_last(path)
                else:
                    path.unlink(missing_ok=True)


def free_bytes(folder: Path) -> int:
    """Free space of the disk that would hold a folder, which need not exist yet."""
    return shutil.disk_usage(_existing(folder)).free


def bytes_in(folder: Path) -> int:
    """Of all files below a folder, which another process may be changing; 0 where there is none."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += Path(place, name).lstat().st_size
    return total


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


def _flush(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
