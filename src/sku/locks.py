"""Folders and files that one process at a time owns, by a lock that ends with the process however that ends.

Where a file system has no such locks (some network disks), nothing is locked and nothing counts as abandoned.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sku.errors import OutputError


def own(place: Path, *, create: bool = False) -> int:
    """Makes a folder or a file this process's own until the file that is returned is closed.

    Args:
        place: Must be there.
        create: Unless this makes it, as an empty file with mode 0600.

    Returns:
        The descriptor of an open file, to close with ``os.close``.

    Raises:
        OutputError: Another process, or another call in this one, owns it.
        OSError: It can't be opened.
    """
    import fcntl

    descriptor = os.open(place, os.O_RDWR | os.O_CREAT if create else os.O_RDONLY, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        owned = place.parent if create else place
        raise OutputError(f"another process is writing {owned}; wait until it ends") from None
    except OSError:
        pass  # No locks here.
    return descriptor


def is_abandoned(folder: Path) -> bool:
    """Whether nobody owns a folder any more; False where that can't be told, or it is gone."""
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Waits until no other process is in such a block for the same folder.

    Raises:
        OSError: The folder can't be opened.
    """
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
