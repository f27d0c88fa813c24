"""A method or a transform from a user's own Python file, so that one can be tried without a change of the package.

The file runs with all the rights of the user: give only files that you have read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, TypeVar

from sku.errors import RecipeError

SUFFIX = ".py"
Kind = TypeVar("Kind")


def defined_in_file(path: str | Path, kind: type[Kind], own_part: str, example: str) -> Kind:
    """The one object of a class, such as ``Method``, that a file defines; the same for the same unchanged file.

    Args:
        path: A file ending in ``.py``.
        kind: The class.
        own_part: Which of its fields holds a function of the file, so that what is imported does not count.
        example: How a file defines one, for messages.

    Raises:
        RecipeError: There is no such file, it fails, or it defines none or several.
    """
    what = kind.__name__.lower()
    module = _module(path, what)
    found = {id(value): value for value in vars(module).values() if isinstance(value, kind)}
    own = [value for value in found.values() if getattr(value, own_part).__module__ == module.__name__]
    if len(own) != 1:
        raise RecipeError(
            f"the {what} file {path} defines {len(own)} {what}s of its own; it must define one, such as {example} "
            f"with an {own_part} function of the file"
        )
    return own[0]


def function_in_file(path: str | Path, name: str) -> Callable[..., Any]:
    """The function of a name that a file defines itself.

    Raises:
        RecipeError: There is no such file, it fails, or it defines no such function.
    """
    module = _module(path, name)
    found = vars(module).get(name)
    if not isinstance(found, FunctionType) or found.__module__ != module.__name__:
        raise RecipeError(f"the {name} file {path} defines no function {name} of its own")
    return found


def file_sha256(path: str | Path) -> str:
    """Hash of a file, so that results of another version are not taken for its own."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _module(path: str | Path, what: str) -> ModuleType:
    try:
        sha256 = file_sha256(path)
    except OSError as error:
        raise RecipeError(f"the {what} file {path} can't be read: {error.strerror or error}") from None
    try:
        return _loaded(str(Path(path).resolve()), sha256)
    except Exception as error:
        raise RecipeError(f"the {what} file {path} fails: {type(error).__name__}: {error}") from error


@cache
def _loaded(path: str, sha256: str) -> ModuleType:
    name = f"sku_file_{sha256[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("it is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Dataclasses look their module up there.
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
