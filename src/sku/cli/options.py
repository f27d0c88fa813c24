"""Options that several commands share, and how they change a recipe."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from sku.cli.completion import judges, recipes
from sku.config import EMBEDDED, Recipe, apply_override, load_recipe

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe of the package (see `sku recipes`) or a YAML file.",
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
) -> Recipe:
    """The recipe with the options of a command put in.

    Raises:
        RecipeError: As ``load_recipe``.
    """
    given = overrides_of(model=model, forget=forget, retain=retain, seed=seed, judge=judge)
    return load_recipe(name, [*given, *(overrides or [])])


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
