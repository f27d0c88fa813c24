"""What a process does to the files below a folder, seen by an audit hook just before it is done; and a full disk.

Python tells a hook of every file that it opens, makes, renames or removes; ``os.fsync`` is wrapped, so that the end of
a write is seen too. What safetensors and torch write from Rust and C++ lies between two operations.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PLACES = {"os.mkdir": 2, "os.remove": 1, "os.rmdir": 1, "os.chmod": 2, "os.rename": 2}
"""Event -> where its folder descriptor stands."""
MAKING = frozenset({"open", "os.mkdir", "os.rename", "os.fsync"})
"""Those for which a disk must have room."""


@dataclass(frozen=True)
class Operation:
    """One operation on a path below the watched folder."""

    event: str
    path: Path


def watch(folder: Path, see: Callable[[Operation], None]) -> None:
    """Calls a function before each operation below a folder, for as long as this process lives; reading is not seen.

    What the function raises, the operation raises.
    """
    busy = False

    def look(operation: Operation) -> None:
        nonlocal busy
        if busy or folder not in operation.path.parents:
            return
        busy = True  # What the function does itself is not seen.
        try:
            see(operation)
        finally:
            busy = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes | os.PathLike) and flags & _WRITES:
                look(Operation(event, Path(os.fsdecode(path))))
        elif event in _PLACES:
            descriptor = arguments[_PLACES[event]]
            around = Path() if descriptor == -1 else Path(f"/proc/self/fd/{descriptor}").readlink()
            path = arguments[0]
            if not isinstance(path, int):
                look(Operation(event, around / os.fsdecode(path)))

    flush = os.fsync

    def fsync(descriptor: int) -> None:
        look(Operation("os.fsync", Path(f"/proc/self/fd/{descriptor}").readlink()))
        flush(descriptor)

    os.fsync = fsync  # type: ignore[assignment]
    sys.addaudithook(hook)


class FullDisk:
    """A disk that takes nothing from now on.

    ``ENOSPC`` and its like are raised by Python's own operations. ``limit N`` is the kernel's: no file may grow beyond
    N bytes, whoever writes it, so that safetensors and torch meet it too (EFBIG).
    """

    def __init__(self, fault: str) -> None:
        self._fault = fault
        if fault.startswith("limit "):
            bytes_ = int(fault.removeprefix("limit "))
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))  # Python ignores SIGXFSZ.

    def see(self, operation: Operation) -> None:
        """Refuses an operation that needs room."""
        if operation.event in MAKING and not self._fault.startswith("limit "):
            number = getattr(errno, self._fault)
            raise OSError(number, os.strerror(number), str(operation.path))


class Branches:
    """At each file operation a copy of the process goes on with a full disk; what it left is noted and undone."""

    def __init__(self, place: Path, output: Path, *, faults: tuple[str, ...], offset: int, every: int) -> None:
        """Takes the faults in turn, at every so many operations."""
        self._faults, self._offset, self._every, self._place, self._output = faults, offset, every, place, output
        self._count = 0
        self._disk: FullDisk | None = None

    def see(self, operation: Operation) -> None:
        """Branches off before an operation that needs room."""
        if self._disk is not None:
            self._disk.see(operation)
            return
        if operation.event not in MAKING:
            return
        self._count += 1
        if self._count % self._every == self._offset:
            self._branch(operation, self._faults[self._count // self._every % len(self._faults)])

    def _branch(self, operation: Operation, fault: str) -> None:
        kept = self._output / "kept"
        shutil.copytree(self._place, kept, copy_function=_copy)
        out, err = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            os.dup2(out[1], 1)
            os.dup2(err[1], 2)
            for descriptor in (*out, *err):
                os.close(descriptor)
            self._disk = FullDisk(fault)
            self._disk.see(operation)
            return
        os.close(out[1])
        os.close(err[1])
        printed = [_read_all(descriptor) for descriptor in (err[0], out[0])]
        _, status = os.waitpid(pid, 0)
        entry = {
            "event": operation.event, "path": str(operation.path.relative_to(self._place)), "fault": fault,
            "code": os.waitstatus_to_exitcode(status), "err": printed[0], "out": printed[1],
            "left": sorted(str(path.relative_to(self._place)) for path in self._place.rglob("*")),
        }  # fmt: skip
        with (self._output / "branches.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        for path in self._place.iterdir():
            shutil.rmtree(path)
        shutil.copytree(kept, self._place, dirs_exist_ok=True, copy_function=_copy)
        shutil.rmtree(kept)


def _copy(source: str, target: str) -> None:
    """A lock has to stay the file that the process holds."""
    if Path(source).name == ".lock":
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def _read_all(descriptor: int) -> str:
    with os.fdopen(descriptor, encoding="utf-8") as file:
        return file.read()
