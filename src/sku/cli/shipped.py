"""``sku methods``, ``sku recipes``: what ships with the package."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from importlib import resources
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sku.cli.console import print_json, results
from sku.cli.options import JsonOption, listed_methods, method_names
from sku.cli.tables import plain_table
from sku.config import load_recipe, recipe_names
from sku.errors import RecipeError, did_you_mean, no_method_named
from sku.from_file import SUFFIX
from sku.quiet import quiet_libraries

if TYPE_CHECKING:
    from sku.methods.base import AnyMethod

_ACCELERATE = resources.files("sku") / "recipes" / "accelerate"

recipes = typer.Typer(help="List the recipes of the package, or show one in full.", invoke_without_command=True)


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One method, with its settings.", autocompletion=method_names)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the methods, or the settings of one."""
    chosen = listed_methods() if name is None else [_method_of(name)]
    if as_json:
        print_json(chosen)
        return
    headings = ("name", "title", "paper")
    table = plain_table(headings)
    for entry in chosen:
        table.add_row(*(entry[heading] for heading in headings))
    results.print(table)
    if name is None:
        return
    method = chosen[0]
    if method["name"] == "sku":
        results.print("\nits settings are acquire and negate of the recipe")
        return
    results.print()
    if name.endswith(SUFFIX):
        results.print(f"method = {json.dumps(name)}")
    for key, value in method["settings"].items():
        results.print(f"methods.{method['name']}.settings.{key} = {json.dumps(value)}")


def _method_of(name: str) -> dict[str, Any]:
    """Of the list, or of a user's file, which is run and so needs torch."""
    if name.endswith(SUFFIX):
        quiet_libraries()
        from sku.methods import method_named

        return described([method_named(name)])[0]
    known = {method["name"]: method for method in listed_methods()}
    if name not in known:
        raise no_method_named(name, known)
    return known[name]


def described(methods: Iterable[AnyMethod]) -> list[dict[str, Any]]:
    """What ``listed_methods`` says, of methods themselves: ``scripts/method_list.py`` writes it, a test compares."""
    return [
        {
            "name": method.name,
            "title": method.title,
            "paper": method.paper_url,
            "negates": method.negates,
            # Those of SKU are acquire and negate of the recipe.
            "settings": {} if method.name == "sku" else dataclasses.asdict(method.settings()),
        }
        for method in methods
    ]


@recipes.callback()
def list_recipes(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the recipes of the package, or show one in full."""
    if context.invoked_subcommand is not None:
        if as_json:
            raise RecipeError(f"--json is given before {context.invoked_subcommand}: put it after")
        return
    if as_json:
        print_json([{"name": name, "description": load_recipe(name).description} for name in recipe_names()])
    else:
        for name in recipe_names():
            results.print(f"{name:<24}{load_recipe(name).description}")


def _launchers() -> list[str]:
    return sorted(entry.name.removesuffix(".yaml") for entry in _ACCELERATE.iterdir())


@recipes.command("accelerate")
def show_launcher(
    name: Annotated[str, typer.Argument(help="ddp, fsdp2 or zero3.", autocompletion=_launchers)],
    as_json: JsonOption = False,
) -> None:
    """Print where a configuration for `accelerate launch --config_file` lies."""
    known = _launchers()
    if name not in known:
        raise RecipeError(f"there is no configuration {name}.{did_you_mean(name, known)} Known: {', '.join(known)}")
    path = str(_ACCELERATE / f"{name}.yaml")
    if as_json:
        print_json({"name": name, "path": path})
    else:
        results.print(path)


@recipes.command("show")
def show_recipe(
    name: Annotated[str, typer.Argument(help="Recipe of the package or YAML file.", autocompletion=recipe_names)],
    as_json: JsonOption = False,
) -> None:
    """Print a recipe with every default spelled out."""
    import yaml

    content = load_recipe(name).to_dict()
    if as_json:
        print_json(content)
    else:
        results.print(yaml.safe_dump(content, sort_keys=False))
