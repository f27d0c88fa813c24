"""What a process does to the files below a folder, seen by an audit hook just before it is done.

Python tells a hook of every file that it opens, makes, renames or removes; ``os.fsync`` is wrapped, so that the end of
a write is seen too. What safetensors and torch write from Rust and C++ lies between two operations.
"""

from __future__ import annotations

import os
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
    """Calls a function before each operation below a folder, for as long as this process lives.

    Args:
        folder: Watched; reading is not seen.
        see: What it raises, the operation raises.
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
