"""The names that a user imports."""

from __future__ import annotations

import ast
import importlib
import os
import re
import sys
import traceback
from pathlib import Path

import pytest

import sku
from sku._version import __version__

ALL: list[str] = vars(sku)["__all__"]  # The stub has none: it is made from the stub.
STUB = Path(sku.__file__).with_name("__init__.pyi")


def listed() -> dict[str, tuple[str, str]]:
    """Public name -> module it is defined in and its name there, read from the stub."""
    return {
        alias.asname or alias.name: (f"sku.{statement.module}", alias.name)
        for statement in ast.parse(STUB.read_text(encoding="utf-8")).body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }


@pytest.mark.parametrize("name", sorted(listed()))
def test_every_listed_name_is_the_one_of_its_module(name: str) -> None:
    module, original = listed()[name]
    assert getattr(sku, name) is getattr(importlib.import_module(module), original)
    assert getattr(sku, name).__doc__


def test_all_is_what_the_stub_lists() -> None:
    assert sorted(ALL) == sorted(listed())
    assert set(ALL) <= set(dir(sku))


def test_the_names_of_the_readme_are_public() -> None:
    names = {"SkuTrainer", "SkuConfig", "TaskVector", "negate", "evaluate", "load_forget_retain"}
    assert names <= set(ALL)


def test_star_import_gives_functions_not_modules_of_the_same_name() -> None:
    """``sku.negate`` is a package and a function: the function must win, whatever was imported before.

    A fork imports the package anew, beside the libraries that are there.
    """
    code = (
        "import sku.negate.task_vector, sku.evaluate.run\n"
        "from sku import *\n"
        "import sku\n"
        "assert callable(negate) and callable(evaluate)\n"
        "assert sku.negate is negate and sku.evaluate is evaluate\n"
    )
    child = os.fork()
    if child == 0:
        try:
            for name in [name for name in sys.modules if name.partition(".")[0] == "sku"]:
                del sys.modules[name]
            exec(code, {})
            os._exit(0)
        finally:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_version_is_one_and_valid() -> None:
    assert sku.__version__ == __version__
    assert re.fullmatch(r"\d+\.\d+\.\d+([.-]?(a|b|rc|dev)\d+)?", __version__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError):
        getattr(sku, "unlearn")  # noqa: B009


def test_the_package_is_typed() -> None:
    assert STUB.with_name("py.typed").is_file()
