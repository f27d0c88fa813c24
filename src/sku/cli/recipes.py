"""``sku recipes``: what ships with the package."""

from __future__ import annotations

from importlib import resources
from typing import Annotated

import typer

from sku.cli.console import print_json, results
from sku.cli.options import JsonOption
from sku.config import load_recipe, recipe_names
from sku.errors import RecipeError, did_you_mean

_ACCELERATE = resources.files("sku") / "recipes" / "accelerate"

app = typer.Typer(help="List the recipes of the package, or show one in full.", invoke_without_command=True)


@app.callback()
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


@app.command("accelerate")
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


@app.command("show")
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
