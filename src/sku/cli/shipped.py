"""``sku methods``, ``sku recipes``, ``sku init``: what ships with the package, and a recipe of one's own from it."""

from __future__ import annotations

import dataclasses
import io
import json
import shlex
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from sku.cli import options
from sku.cli.console import plain_table, print_json, print_next, results
from sku.config import apply_override, load_recipe, recipe_from_dict, recipe_names
from sku.config.recipe import read_yaml, recipe_text
from sku.errors import OutputError, RecipeError, did_you_mean, no_method_named
from sku.from_file import SUFFIX
from sku.quiet import quiet_libraries
from sku.storage import named_disk_errors, write_text

if TYPE_CHECKING:
    from sku.methods.base import AnyMethod

_ACCELERATE = resources.files("sku") / "recipes" / "accelerate"

recipes = typer.Typer(help="List the recipes of the package, or show one in full.", invoke_without_command=True)


def methods(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="One method, with its settings.", autocompletion=options.method_names),
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """List the methods, or the settings of one."""
    chosen = options.listed_methods() if name is None else [_method_of(name)]
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
    known = {method["name"]: method for method in options.listed_methods()}
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
def list_recipes(context: typer.Context, as_json: options.JsonOption = False) -> None:
    """List the recipes of the package, or show one in full."""
    if context.invoked_subcommand is not None:
        if as_json:
            raise RecipeError(f"--json is given before {context.invoked_subcommand}: put it after")
        return
    if as_json:
        print_json([{"name": name, "description": load_recipe(name).description} for name in recipe_names()])
    else:
        for name in recipe_names():
            results.print(f"{name:<26}{load_recipe(name).description}")


def _launchers() -> list[str]:
    return sorted(entry.name.removesuffix(".yaml") for entry in _ACCELERATE.iterdir())


@recipes.command("accelerate")
def show_launcher(
    name: Annotated[str, typer.Argument(help="ddp, fsdp2 or zero3.", autocompletion=_launchers)],
    as_json: options.JsonOption = False,
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
    as_json: options.JsonOption = False,
) -> None:
    """Print a recipe with every default spelled out."""
    import yaml

    content = load_recipe(name).to_dict()
    if as_json:
        print_json(content)
    else:
        results.print(yaml.safe_dump(content, sort_keys=False))


def init(
    forget: Annotated[
        str, typer.Argument(metavar="PROMPTS", help="Harmful prompts: file, folder or hub id; answers are not read.")
    ],
    model: Annotated[str, typer.Option(help="Folder or hub id of the model to unlearn.")],
    retain: Annotated[str | None, typer.Option(help="Normal prompts, in place of those that ship with SKU.")] = None,
    judge: options.JudgeOption = None,
    overrides: options.SetOption = None,
    out: Annotated[Path, typer.Option(help="New YAML file.")] = Path("recipe.yaml"),
    as_json: options.JsonOption = False,
) -> None:
    """Write the recipe that `sku run MODEL --forget PROMPTS` uses, to read, change and run; --set as there."""
    if out.exists():
        raise OutputError(f"{out} is there already: name another file with --out")
    made = options.recipe_made_for(model)
    source = made or options.GENERAL
    yaml = YAML()  # Keeps comments.
    yaml.width = 1000
    content = yaml.load(recipe_text(source)[0])
    described = content["description"]
    if made is None:
        content.update(options.called_by(model, source))
        content["model"] = {"path": model}
    _replace(content["data"], "forget", {"path": forget})
    if retain is not None:
        _replace(content["data"], "retain", {"path": retain})
    if judge is not None:
        _replace(content["evaluate"], "judge", judge)
    for override in overrides or ():
        _set(content, override)
    text = io.StringIO()
    yaml.dump(content, text)
    body = text.getvalue()
    body = body[body.index("name:") :]  # The comment in front is about another file.
    recipe = recipe_from_dict(read_yaml(body), "with these options")  # Before a file stands that can't be run.
    run = shlex.join(["sku", "run", str(out), "--out", f"runs/{recipe.name}"])
    with named_disk_errors(out):
        write_text(out, f"# {run}\n#\n# Settings of recipe {source}: {described}\n{body}")
    if as_json:
        print_json({"recipe": str(out), "settings": recipe.to_dict()})
        return
    results.print(f"recipe    {out}, with the settings of {source}")
    print_next(["run", out, "--dry-run"], ["plan", out], ["run", out, "--out", f"runs/{recipe.name}"])


def _set(content: Any, override: str) -> None:
    """Puts a value of ``--set`` in, at a key as ``sku run --set`` takes it."""
    apply_override(content, override)
    *parents, last = override.partition("=")[0].split(".")
    section = content
    for parent in parents:
        section = section[parent]
    if isinstance(section, CommentedMap):
        section.ca.items.pop(last, None)  # It spoke of the value that stood there.


def _replace(section: Any, key: str, value: Any) -> None:
    """Puts a value in, and leaves the comment of the old one out, which spoke of that."""
    section[key] = value
    section.ca.items.pop(key, None)
