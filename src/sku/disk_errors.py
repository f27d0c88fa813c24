"""What the system says when a file can't be written, in one line that names the place."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sku.errors import OutputError

_FULL = ("No space left", "Disk quota exceeded", "File too large")
"""What safetensors quotes of the system's words."""


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
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"the disk is full: {path} was not written; free some space and run again") from error
        raise OutputError(f"{path} can't be written: {error.strerror or error}") from error
    except Exception as error:
        # safetensors reports the system's error as one of its own type, with the system's words inside.
        if not isinstance(error, SafetensorError) or "I/O error" not in str(error):
            raise
        if any(words in str(error) for words in _FULL):
            raise OutputError(f"the disk is full: {path} was not written; free some space and run again") from error
        raise OutputError(f"{path} can't be written: {error}") from error
