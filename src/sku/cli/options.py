"""Options that several commands share, and how they change a recipe."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from sku.cli.completion import judges, recipes
from sku.cli.console import print_headline
from sku.cli.inputs import check_inputs
from sku.config import EMBEDDED, Recipe, apply_override, load_recipe, recipe_names
from sku.errors import RecipeError

GENERAL = "llama-3.1-8b"
"""Recipe whose settings a model takes that no recipe is made for: what fits 8B on one card fits smaller ones."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe of the package (see `sku recipes`), a YAML file, or a model: its folder or hub id.",
        autocompletion=recipes,
    ),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Folder or hub id of the model, in place of the recipe's.")
]
ForgetOption = Annotated[
    str | None, typer.Option("--forget", help="File, folder or hub id of the harmful data, in place of the recipe's.")
]
RetainOption = Annotated[
    str | None, typer.Option("--retain", help="File, folder or hub id of the normal data, in place of the recipe's.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Any recipe key, such as acquire.training.max_steps=20; repeatable."
    ),
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Seed of the run, in place of the recipe's.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Check recipe, data, model folder and disk, say what would be done, and write nothing."
    ),
]
JudgeOption = Annotated[
    str | None,
    typer.Option(
        "--judge",
        metavar="NAME_OR_FILE",
        autocompletion=judges,
        help="Judge, judge file or CSV of labels, in place of the recipe's; its settings: --set "
        "evaluate.judge_settings.model=...",
    ),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="New folder for the result; runs/RECIPE-TIME where this is left out.")
]


def resolve_recipe(
    name: str = EMBEDDED,
    *,
    model: str | None = None,
    forget: str | None = None,
    retain: str | None = None,
    seed: int | None = None,
    judge: str | None = None,
    overrides: list[str] | None = None,
    check: bool = True,
) -> Recipe:
    """The recipe with the options of a command put in.

    Args:
        name: A recipe, or a model to use the settings of a recipe for.
        model: As ``--model``.
        forget: As ``--forget``.
        retain: As ``--retain``.
        seed: As ``--seed``.
        judge: As ``--judge``.
        overrides: As ``--set``.
        check: Refuse what can be found wrong with model and data before torch is loaded.

    Raises:
        RecipeError: As ``load_recipe``, or two models are given.
        ModelError: As ``check_inputs``.
        DataError: As ``check_inputs``.
    """
    named: list[str] = []
    if _is_model(name):
        if model is not None:
            raise RecipeError(f"{name} is a model, and --model {model} is another: give one, or a recipe with --model")
        name, model, named = _recipe_for(name)
    given = overrides_of(model=model, forget=forget, retain=retain, seed=seed, judge=judge)
    recipe = load_recipe(name, [*named, *given, *(overrides or [])])
    if check:
        check_inputs(recipe)
    return recipe


def _is_model(name: str) -> bool:
    """Whether a model stands where a recipe is expected: a folder, or a hub id with its owner."""
    if Path(name).suffix in {".yaml", ".yml"} or name in recipe_names():
        return False
    return Path(name).is_dir() or (_HUB_ID.fullmatch(name) is not None and not Path(name).parent.is_dir())


def _recipe_for(model: str) -> tuple[str, str | None, list[str]]:
    """The recipe that is made for a model, else ``GENERAL`` with its model, name and description put in.

    Returns:
        The recipe, the model to put in, and what else is overridden. Which recipe it is, is said on standard error.
    """
    made = next((name for name in recipe_names() if load_recipe(name).model.path.lower() == model.lower()), None)
    found = made or GENERAL
    print_headline(f"{model} with the settings of recipe {found}: `sku recipes show {found}` prints them")
    if made is not None:
        return made, None, []
    name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in Path(model).resolve().name)
    text = {"name": name.lstrip(".") or "model", "description": f"{model} with the settings of recipe {found}."}
    return found, model, [f"{key}={json.dumps(value)}" for key, value in text.items()]


def overrides_of(
    *,
    model: str | None = None,
    forget: str | None = None,
    retain: str | None = None,
    seed: int | None = None,
    judge: str | None = None,
) -> list[str]:
    """The options of a command as ``KEY=VALUE`` overrides of a recipe."""
    # Another source, model or judge takes the whole place: split, columns, revision, settings belong to the one that
    # it replaces.
    given = {
        "model": None if model is None else {"path": model},
        "data.forget": None if forget is None else {"path": forget},
        "data.retain": None if retain is None else {"path": retain},
        "seed": seed,
        "evaluate.judge": judge,
        "evaluate.judge_settings": None if judge is None else {},
    }
    # JSON is YAML, and quotes what YAML would otherwise read as a number or a date.
    return [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]


def words_of(
    *,
    model: str | None = None,
    forget: str | None = None,
    retain: str | None = None,
    seed: int | None = None,
    judge: str | None = None,
    overrides: list[str] | None = None,
) -> list[str]:
    """The options of a command as they were given, for another command that is to work with the same."""
    named = {"--model": model, "--forget": forget, "--retain": retain, "--seed": seed, "--judge": judge}
    given = [word for name, value in named.items() if value is not None for word in (name, str(value))]
    return [*given, *(word for override in overrides or [] for word in ("--set", override))]


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
