"""What a shell completes: names of recipes, methods, judges and the like. Nothing heavy is imported for that."""

from __future__ import annotations

from importlib import resources

from sku.cli.method_list import listed_methods
from sku.config import EMBEDDED, recipe_names

ABLATION_NAMES = ("modules", "preservation", "random_answers")
"""Names of ``sku.comparison.jobs.ABLATIONS``."""
JUDGE_RULES = (EMBEDDED, "refusal_rules")
"""Names of ``sku.evaluate.judges.choose.RULES``."""


def recipes(incomplete: str) -> list[str]:
    """Recipes of the package that begin like what was typed; where none does, the shell offers files."""
    return _beginning(recipe_names(), incomplete)


def methods(incomplete: str) -> list[str]:
    """Methods that begin so."""
    return _beginning(_method_names(), incomplete)


def method_list(incomplete: str) -> list[str]:
    """Methods with commas between: the last one is completed."""
    return _last_of_list(_method_names(), incomplete)


def ablation_list(incomplete: str) -> list[str]:
    """Groups of ablations with commas between."""
    return _last_of_list(ABLATION_NAMES, incomplete)


def judges(incomplete: str) -> list[str]:
    """Judges of the package that begin so."""
    folder = resources.files("sku") / "evaluate" / "judges" / "files"
    files = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return _beginning((*JUDGE_RULES, *files), incomplete)


def launchers(incomplete: str) -> list[str]:
    """Configurations for ``accelerate launch`` that begin so."""
    folder = resources.files("sku") / "recipes" / "accelerate"
    return _beginning(sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir()), incomplete)


def _method_names() -> tuple[str, ...]:
    return tuple(method["name"] for method in listed_methods())


def _beginning(names: list[str] | tuple[str, ...], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _last_of_list(names: tuple[str, ...], incomplete: str) -> list[str]:
    before, comma, last = incomplete.rpartition(",")
    given = set(before.split(","))
    return [before + comma + name for name in _beginning(names, last) if name not in given]
