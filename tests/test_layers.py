"""Which part may know which: the arrows between the packages, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sku

ROOT = Path(sku.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
PARTS = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES} - {"__init__", "__main__", "_version"}

# fmt: off
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "world": set(),
    "config": {"errors"},
    "storage": {"errors"},
    "losses": set(),
    "reproducibility": {"_version", "quiet"},
    "data": {"config", "errors", "world"},
    "hazard": {"errors", "storage"},
    "from_file": {"errors"},
    "kept_replies": {"errors", "storage"},
    "model_files": {"config", "errors"},
    "models": {"config", "errors", "storage", "hazard", "model_files"},
    "quiet": set(),
    "progress": set(),
    "processes": {"errors", "storage"},
    "training": {"config", "errors", "storage", "hazard", "losses", "data", "models", "processes"},
    "acquire": {"config", "errors", "storage", "losses", "data", "models", "training"},
    "quantization": {"config"},
    "negate": {
        "config", "errors", "from_file", "storage", "hazard", "losses", "data", "model_files", "models",
        "quantization",
    },
    "evaluate": {"config", "errors", "storage", "losses", "data", "models", "world", "quantization", "processes"},
    "own_replies": {"config", "errors", "kept_replies", "storage", "data", "models", "evaluate", "world"},
    "methods": {
        "config", "errors", "from_file", "storage", "losses", "data", "models", "training", "acquire",
        "negate",
    },
    "attacks": {
        "config", "errors", "data", "models", "world", "training", "methods", "evaluate", "quantization",
    },
    "plan": {"storage"},
    "memory": {"config", "errors", "losses", "models", "plan", "training", "acquire", "methods"},
    "report": {"_version", "config", "errors", "progress", "storage", "evaluate", "attacks", "sweep"},
    "sweep": {
        "config", "errors", "storage", "data", "models", "methods", "negate", "evaluate", "reproducibility",
    },
    "chat": {"config", "errors", "storage", "data", "models", "negate", "evaluate", "report"},
    "push": {"errors", "storage", "negate", "report"},
    "comparison": {
        "config", "errors", "from_file", "storage", "data", "models", "training", "methods", "negate", "evaluate",
        "report", "reproducibility", "sweep", "quiet",
    },
}
# fmt: on
"""Part -> parts of the package that it may import. ``pipeline`` and ``cli`` may import all."""


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Full names of all modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # "from sku.evaluate import asking" imports sku.evaluate.asking.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parts_imported(path: Path) -> set[str]:
    own = {name.split(".")[1] for name in imported(path) if name.startswith("sku.")}
    return own - {part_of(path)}


def test_every_part_has_its_place() -> None:
    assert set(ALLOWED) | {"pipeline", "cli"} == PARTS


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_a_part_imports_only_what_it_may(part: str) -> None:
    wrong = {
        str(path.relative_to(ROOT)): sorted(parts_imported(path) - ALLOWED[part])
        for path in FILES
        if part_of(path) == part and parts_imported(path) - ALLOWED[part]
    }
    assert wrong == {}


def test_nothing_but_the_command_line_imports_it_and_only_it_imports_the_pipeline() -> None:
    for path in FILES:
        if path.name not in ("__main__.py",) and part_of(path) != "cli":
            assert parts_imported(path).isdisjoint({"cli", "pipeline"}), path


@pytest.mark.parametrize("part", ["report", "plan", "push", "config", "errors", "storage"])
def test_these_parts_do_not_import_torch_or_transformers(part: str) -> None:
    for path in FILES:
        if part_of(path) == part:
            assert {name.partition(".")[0] for name in imported(path)}.isdisjoint({"torch", "transformers", "peft"})


def test_commands_import_heavy_packages_only_inside_functions() -> None:
    heavy = {"torch", "transformers", "datasets", "peft", "matplotlib", "sku.pipeline", "sku.models"}
    for path in (ROOT / "cli").glob("*.py"):
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                module = statement.module if isinstance(statement, ast.ImportFrom) else statement.names[0].name
                assert module not in heavy, path


def test_no_file_is_a_drawer_for_everything() -> None:
    assert not {path.stem for path in FILES} & {"utils", "helpers", "common", "misc", "util", "helper"}


def public_definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node
            yield from public_definitions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node


def is_own_definition(node: ast.AST) -> bool:
    """Overloads have no text of their own."""
    names = {ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])}
    return names.isdisjoint({"overload", "typing.overload", "override", "typing.override"})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_public_is_explained(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) or path.name == "_version.py"
    missing = [
        name
        for name, node in public_definitions(tree.body)
        if is_own_definition(node)
        and isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and not ast.get_docstring(node)
    ]
    assert missing == []
