"""A method or a transform from a user's own Python file, so that one can be tried without a change of the package.

The file runs with all the rights of the user: give only files that you have read.
"""

from __future__ import annotations

import hashlib
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from sku.errors import RecipeError

SUFFIX = ".py"


def names_in_file(path: str | Path, what: str) -> dict[str, Any]:
    """What a file defines and imports, by name; the same objects for the same unchanged file.

    Args:
        path: A file ending in ``.py``. What it defines itself has its ``__name__`` as ``__module__``.
        what: What it is to define, for messages.

    Raises:
        RecipeError: There is no such file, or it fails.
    """
    try:
        return vars(_loaded(str(Path(path).resolve()), Path(path).read_bytes()))
    except Exception as error:
        raise RecipeError(f"the {what} file {path} fails: {type(error).__name__}: {error}") from error


@cache
def _loaded(path: str, source: bytes) -> ModuleType:
    module = ModuleType(f"sku_file_{hashlib.sha256(source).hexdigest()[:16]}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # Dataclasses look their module up there.
    try:
        exec(compile(source, path, "exec"), vars(module))
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module
