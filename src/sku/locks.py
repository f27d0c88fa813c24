"""Folders and files that one process at a time owns, by a lock that ends with the process however that ends.

Where a file system has no such locks (some network disks), nothing is locked and nothing counts as abandoned.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sku.errors import OutputError

LOCK_FILE = ".lock"
"""Lies in a folder that one process writes for long; what a killed one leaves of it holds nobody up."""


def own(place: Path) -> int:
    """Makes a folder or a file this process's own until the file that is returned is closed.

    Args:
        place: Must be there.

    Returns:
        The descriptor of an open file, to close with ``os.close``.

    Raises:
        OutputError: Another process, or another call in this one, owns it.
        OSError: It can't be opened.
    """
    return _lock(os.open(place, os.O_RDONLY), place)


def own_by_file(folder: Path) -> int:
    """As ``own``, by the file ``LOCK_FILE`` in a folder, with mode 0600; it is made where there is none.

    Args:
        folder: Must be there.

    Returns:
        The descriptor of the file, which stays there when it is closed.

    Raises:
        OutputError: Another process, or another call in this one, owns the folder.
        OSError: It can't be written.
    """
    return _lock(os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600), folder)


def _lock(descriptor: int, place: Path) -> int:
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OutputError(f"another process is writing {place}; wait until it ends") from None
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
