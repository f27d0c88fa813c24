"""Reading of recipes: files and names of the package, and what ``--set`` changes in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sku.config.check import build, check_plain
from sku.config.model import EMBEDDED
from sku.config.recipe import Recipe
from sku.config.yaml_text import read_yaml
from sku.errors import RecipeError, did_you_mean, one_line

S = TypeVar("S")


def recipe_names() -> list[str]:
    """Names of the recipes inside the package."""
    folder = resources.files("sku") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str | Path = EMBEDDED, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, applies ``key.sub=value`` overrides, and checks every key and type.

    Args:
        name_or_path: Name of a recipe of the package, or a YAML file.
        overrides: Such as ``acquire.training.max_steps=20``; the value is read as YAML.

    Returns:
        The checked recipe.

    Raises:
        RecipeError: Unknown recipe or key (with a suggestion), wrong type, or a value out of range.
    """
    text, where = _recipe_text(name_or_path)
    try:
        content = read_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{where} must hold keys and values, such as 'name: my-run'")
    for override in overrides:
        apply_override(content, override)
    return recipe_from_dict(content, where)


def recipe_from_dict(content: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Checks plain data against the fields of ``Recipe``.

    Raises:
        RecipeError: As ``load_recipe``.
    """
    recipe = build(Recipe, content, "", where)
    assert isinstance(recipe, Recipe)
    check_plain(recipe.to_dict(), "", where)
    return recipe


def settings_from_dict(target: type[S], content: Mapping[str, Any], key: str, where: str = "recipe") -> S:
    """Checks plain data against a frozen dataclass of settings, such as a method's own.

    Args:
        target: The dataclass.
        content: Keys and values.
        key: The recipe's key that holds them, for messages.
        where: Name of the recipe, for messages.

    Returns:
        The settings.

    Raises:
        RecipeError: As ``load_recipe``.
    """
    settings = build(target, content, key, where)
    assert isinstance(settings, target)
    return settings


def _recipe_text(name_or_path: str | Path) -> tuple[str, str]:
    name = str(name_or_path)
    path = Path(name_or_path)
    try:
        if path.suffix in {".yaml", ".yml"} or path.is_file():
            if path.exists() and not path.is_file():  # A pipe would be waited for, and a device read for ever.
                raise RecipeError(f"recipe {name} is no file")
            return path.read_text(encoding="utf-8"), name
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe file {name}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {name} can't be read: {error}") from None
    if name not in recipe_names():
        known = recipe_names()
        raise RecipeError(
            f"there is no recipe named {name}.{did_you_mean(name, known, most=4)} Known: {', '.join(known)}; "
            "or give a .yaml file"
        )
    return (resources.files("sku") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"), f"recipe {name}"


def apply_override(content: dict[str, Any], override: str) -> None:
    """Sets one value of nested plain data.

    Args:
        content: Changed in place.
        override: ``key.sub=value``; the value is read as YAML.

    Raises:
        RecipeError: No key, no sign, no YAML, or a key below a value.
    """
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override} must look like key.sub=value")
    try:
        parsed = read_yaml(value) if value else None
    except yaml.YAMLError:
        raise RecipeError(f"--set {override}: {value!r} is not a YAML value") from None
    *parents, last = key.split(".")
    node = content
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise RecipeError(f"--set {override}: {parent} is a value, it has no keys below it")
        node = child
    node[last] = parsed
