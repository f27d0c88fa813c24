"""A method from a user's own Python file, so that one can be tried without a change of the package."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from functools import cache
from pathlib import Path

from sku.errors import RecipeError
from sku.methods.base import AnyMethod, Method

SUFFIX = ".py"


def method_from_file(path: str | Path) -> AnyMethod:
    """Runs a Python file and takes the one ``Method`` that it defines.

    The file runs with all the rights of the user: give only files that you have read.

    Args:
        path: A file ending in ``.py``.

    Returns:
        The method, the same object for the same unchanged file.

    Raises:
        RecipeError: There is no such file, it fails, or it defines no method or several.
    """
    file = Path(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise RecipeError(f"the method file {path} can't be read: {error.strerror or error}") from None
    return _loaded(str(file.resolve()), hashlib.sha256(content).hexdigest())


def file_sha256(path: str | Path) -> str:
    """Hash of a method file, so that results of another version are not taken for its own."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@cache
def _loaded(path: str, sha256: str) -> AnyMethod:
    name = f"sku_method_{sha256[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None, "a file ending in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Dataclasses look their module up there.
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RecipeError(f"the method file {path} fails: {type(error).__name__}: {error}") from error
    found = {id(value): value for value in vars(module).values() if isinstance(value, Method)}
    own = [method for method in found.values() if method.objective.__module__ == name]
    if len(own) != 1:
        raise RecipeError(
            f"the method file {path} defines {len(own)} methods of its own; it must define one, such as "
            "MY_METHOD = Method(name=..., ...) with an objective function of the file"
        )
    return own[0]
