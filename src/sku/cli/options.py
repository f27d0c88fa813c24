"""Options that several commands share, and how they change a recipe."""

from __future__ import annotations

import dataclasses
import json
import re
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypedDict, Unpack

import typer

from sku.cli.console import print_headline
from sku.config import Recipe, apply_override, load_recipe, recipe_names
from sku.errors import RecipeError

GENERAL = "llama-3.1-8b"
"""Recipe whose settings a model takes that no recipe is made for: what fits 8B on one card fits smaller ones."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def listed_methods() -> list[dict[str, Any]]:
    """Name, title, paper, whether it negates, and settings with their defaults of each method, in its order.

    From ``listed.json``: ``sku.methods`` itself loads torch, which takes seconds.
    """
    listed = resources.files("sku") / "methods" / "listed.json"
    return list(json.loads(listed.read_text(encoding="utf-8")))


def method_names() -> list[str]:
    """Of all methods of the package."""
    return [method["name"] for method in listed_methods()]


def judges() -> list[str]:
    """Names of all judges of the package."""
    from sku.evaluate.judges.choose import judge_names

    return list(judge_names())


def names_in(text: str | None) -> list[str]:
    """Those of a list with commas."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def set_option(text: str) -> Any:
    """``--set``, repeatable, of a command whose settings it changes."""
    return typer.Option("--set", metavar="KEY=VALUE", help=f"{text}; repeatable.")


def judge_option(text: str) -> Any:
    """``--judge`` of a command."""
    return typer.Option("--judge", metavar="NAME_OR_FILE", autocompletion=judges, help=text)


RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe of the package (see `sku init`), a YAML file, or a model: its folder or hub id.",
        autocompletion=recipe_names,
    ),
]
ModelOption = Annotated[str | None, typer.Option("--model", help="Model: folder or hub id.")]
ForgetOption = Annotated[str | None, typer.Option("--forget", help="Harmful data: file, folder or hub id.")]
RetainOption = Annotated[str | None, typer.Option("--retain", help="Normal data: file, folder or hub id.")]
SetOption = Annotated[list[str] | None, set_option("Any recipe key, such as acquire.training.max_steps=20")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Seed of the run.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, say what would be done, write nothing.")
]
JudgeOption = Annotated[str | None, judge_option("Judge, judge file or CSV of labels.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="New folder; runs/RECIPE-TIME if not given.")]


class Changes(TypedDict, total=False):
    """Options of a command that change its recipe, each as the command line gives it."""

    model: str | None
    forget: str | None
    retain: str | None
    seed: int | None
    judge: str | None
    overrides: list[str] | None
    """As ``--set``."""


def resolve_recipe(name: str, **changes: Unpack[Changes]) -> Recipe:
    """The recipe with the options of a command put in.

    Args:
        name: A recipe, or a model to use the settings of a recipe for.
        **changes: Options of the command.

    Raises:
        RecipeError: As ``load_recipe``, or two models are given.
        ModelError: As ``with_gguf_file``.
    """
    named: list[str] = []
    if _is_model(name):
        if (model := changes.get("model")) is not None:
            raise RecipeError(f"{name} is a model, and --model {model} is another: give one, or a recipe with --model")
        name, changes["model"], named = recipe_for(name)
    from sku.model_files import with_gguf_file

    recipe = load_recipe(name, [*named, *overrides_of(**changes)])
    # So that what the run records names the file, and the commands that are printed next do.
    return dataclasses.replace(recipe, model=with_gguf_file(recipe.model))


def _is_model(name: str) -> bool:
    """Whether a model stands where a recipe is expected: a folder, or a hub id with its owner."""
    if Path(name).suffix in {".yaml", ".yml"} or name in recipe_names():
        return False
    return Path(name).is_dir() or (_HUB_ID.fullmatch(name) is not None and not Path(name).parent.is_dir())


def recipe_for(model: str) -> tuple[str, str | None, list[str]]:
    """The recipe that is made for a model, else ``GENERAL`` with its model, name and description put in.

    Returns:
        The recipe, the model to put in, and what else is overridden. Which recipe it is, is said on standard error.
    """
    made = next((name for name in recipe_names() if load_recipe(name).model.path.lower() == model.lower()), None)
    found = made or GENERAL
    print_headline(f"{model} with the settings of recipe {found}: `sku init {found}` prints them")
    if made is not None:
        return made, None, []
    name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in Path(model).resolve().name)
    called = {"name": name.lstrip(".") or "model", "description": f"{model} with the settings of recipe {found}."}
    return found, model, [f"{key}={json.dumps(value)}" for key, value in called.items()]


def overrides_of(**changes: Unpack[Changes]) -> list[str]:
    """The options of a command as ``KEY=VALUE`` overrides of a recipe."""
    places = {"model": "model", "forget": "data.forget", "retain": "data.retain", "judge": "evaluate.judge"}
    given: dict[str, Any] = {places.get(name, name): value for name, value in changes.items() if value is not None}
    overrides = given.pop("overrides", [])
    # Another source, model or judge takes the whole place: split, columns, revision, settings belong to the one that
    # it replaces.
    for key in given.keys() & {"model", "data.forget", "data.retain"}:
        given[key] = {"path": given[key]}
    if "evaluate.judge" in given:
        given["evaluate.judge_settings"] = {}
    # JSON is YAML, and quotes what YAML would otherwise read as a number or a date.
    return [*(f"{key}={json.dumps(value)}" for key, value in given.items()), *overrides]


def settings_of(overrides: list[str] | None) -> dict[str, Any]:
    """Settings from ``KEY=VALUE`` options, with values read as YAML.

    Raises:
        RecipeError: An option without a key or a sign, or a value that is no YAML.
    """
    settings: dict[str, Any] = {}
    for override in overrides or []:
        apply_override(settings, override)
    return settings


def new_run_folder(name: str) -> Path:
    """Where a run goes when the user names no folder."""
    return Path("runs") / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
