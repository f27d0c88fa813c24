"""A method or an operator from a user's own Python file, so that one can be tried without a change of the package."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from sku.errors import RecipeError

SUFFIX = ".py"
Kind = TypeVar("Kind")


def defined_in_file(path: str | Path, kind: type[Kind], own_part: str, example: str) -> Kind:
    """Runs a Python file and takes the one ``Method`` or ``Operator`` that it defines.

    The file runs with all the rights of the user: give only files that you have read.

    Args:
        path: A file ending in ``.py``.
        kind: The class of what is looked for.
        own_part: Which of its fields holds a function of the file, so that what is imported does not count.
        example: How a file defines one, for messages.

    Returns:
        What was defined, the same object for the same unchanged file.

    Raises:
        RecipeError: There is no such file, it fails, or it defines none or several.
    """
    what = kind.__name__.lower()
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise RecipeError(f"the {what} file {path} can't be read: {error.strerror or error}") from None
    try:
        module = _loaded(str(Path(path).resolve()), hashlib.sha256(content).hexdigest())
    except Exception as error:
        raise RecipeError(f"the {what} file {path} fails: {type(error).__name__}: {error}") from error
    found = {id(value): value for value in vars(module).values() if isinstance(value, kind)}
    own = [value for value in found.values() if getattr(value, own_part).__module__ == module.__name__]
    if len(own) != 1:
        raise RecipeError(
            f"the {what} file {path} defines {len(own)} {what}s of its own; it must define one, such as {example} "
            f"with an {own_part} function of the file"
        )
    return own[0]


def file_sha256(path: str | Path) -> str:
    """Hash of a file, so that results of another version are not taken for its own."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@cache
def _loaded(path: str, sha256: str) -> ModuleType:
    name = f"sku_file_{sha256[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None, "a file ending in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Dataclasses look their module up there.
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
