"""Memory that is freed stays with the process: a step of training on a CPU takes the same large blocks each time.

glibc's ``malloc`` asks the system for each block above some size and gives it back when it is freed, and the system
fills every page with zeros before it hands it out. ``benchmarks/freed_memory.py`` measures what that costs.
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Numbers of ``mallopt``'s settings in glibc's ``malloc.h``."""
_NEVER = -1
_TAKEN_AT_ONCE = 256 * 2**20
"""Bytes."""
_OF_THE_USER = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Tells ``malloc`` to keep what is freed for later, in this process and until it ends.

    The process then holds the most memory that it ever needed. Nothing is done where the user has set ``malloc`` by
    environment variables, or where it isn't glibc's.

    Returns:
        Whether it was done.
    """
    if any(name in os.environ for name in _OF_THE_USER):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _TAKEN_AT_ONCE))
    return all(bool(mallopt(name, number)) for name, number in settings)
