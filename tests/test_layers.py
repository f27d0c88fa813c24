"""Which part of the package may know which, read from the source; and the names that a user imports."""

from __future__ import annotations

import ast
import importlib
import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path

import sku

ROOT = Path(sku.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

ALLOWED = {
    "_version": "",
    "errors": "",
    "world": "",
    "losses": "",
    "progress": "",
    "config": "errors",
    "storage": "errors",
    "from_file": "errors",
    "hazard": "errors storage",
    "kept_replies": "errors storage",
    "processes": "errors storage",
    "quantization": "config",
    "model_files": "config errors",
    "data": "config errors world",
    "models": "config errors storage hazard model_files",
    "training": "config errors storage hazard losses data models processes",
    "negate": "config errors from_file storage hazard losses data model_files models quantization",
    "evaluate": "config errors storage losses data models world quantization processes",
    "own_replies": "config errors kept_replies storage data models evaluate world",
    "methods": "config errors from_file storage losses data models training negate",
    "attacks": "config errors data models processes world training methods evaluate quantization",
    "memory": "config errors losses models training methods",
    "report": "_version config errors progress storage evaluate attacks sweep",
    "sweep": "config errors storage data models processes methods negate evaluate",
    "chat": "config errors storage data models negate evaluate report",
    "push": "errors storage progress negate report",
    "comparison": "config errors from_file storage data models processes training methods negate evaluate report "
    "sweep",
}
"""Part -> parts of the package that it may import. ``pipeline`` may import all but ``cli``, which may import all."""


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Full names of all modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # "from sku.evaluate import harness" imports sku.evaluate.harness.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_a_part_imports_only_what_it_may() -> None:
    parts = {part_of(path) for path in FILES} - {"__init__", "__main__"}
    assert set(ALLOWED) | {"pipeline", "cli"} == parts
    allowed = {part: set(names.split()) for part, names in ALLOWED.items()}
    allowed |= {"cli": parts, "__main__": parts, "pipeline": parts - {"cli"}, "__init__": parts - {"cli", "pipeline"}}
    for path in FILES:
        part = part_of(path)
        own = {name.split(".")[1] for name in imported(path) if name.startswith("sku.")} - {part}
        assert own <= allowed[part], path
        if part in ("report", "push", "config", "errors", "storage"):
            assert {name.partition(".")[0] for name in imported(path)}.isdisjoint({"torch", "transformers", "peft"})
        assert path.stem not in ("utils", "helpers", "common", "misc", "util", "helper")


def test_every_listed_name_is_the_one_of_its_module() -> None:
    for statement in ast.parse(ROOT.joinpath("__init__.pyi").read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                found = getattr(sku, alias.asname or alias.name)
                assert found is getattr(importlib.import_module(f"sku.{statement.module}"), alias.name)


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

    def import_anew() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "sku"]:
            del sys.modules[name]
        exec(code, {})

    child = multiprocessing.get_context("fork").Process(target=import_anew)
    child.start()
    child.join()
    assert child.exitcode == 0
