"""``sku sweep``: the choice of alpha."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sku.cli import options
from sku.cli.console import errors, perform, print_json, print_next, print_notes, results
from sku.config import EMBEDDED, Recipe, apply_override, load_recipe, recipe_from_dict, recipe_names
from sku.errors import ModelError, RecipeError
from sku.progress import quiet_libraries

if TYPE_CHECKING:
    from sku.sweep import Sweep


def sweep(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A recipe, a folder of `sku run` that kept its bad model, or a bad model.",
            autocompletion=recipe_names,
        ),
    ] = EMBEDDED,
    recipe: Annotated[
        str | None,
        typer.Option(help="Recipe for a folder, in place of the one it was made with.", autocompletion=recipe_names),
    ] = None,
    model: options.ModelOption = None,
    forget: options.ForgetOption = None,
    retain: options.RetainOption = None,
    out: options.OutOption = None,
    judge: options.JudgeOption = None,
    seed: options.SeedOption = None,
    overrides: options.SetOption = None,
    keep_bad_model: Annotated[
        bool, typer.Option("--keep-bad-model", help="Keep the hazardous model that was trained for the sweep.")
    ] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Choose alpha by held-out data: the frontier of harm and utility, and the pick. A second call goes on."""
    changes = options.overrides_of(
        model=model, forget=forget, retain=retain, seed=seed, judge=judge, overrides=overrides
    )
    settings, bad = _read_target(target, recipe, changes)
    folder = out or options.new_run_folder(f"sweep-{settings.name}")

    quiet_libraries()
    from sku.pipeline.stages import run_sweep

    source = "trained first" if bad is None else str(bad)
    again = shlex.join(["--out", str(folder)])
    try:
        found = perform(
            lambda show: run_sweep(settings, folder, bad=bad, keep_bad_model=keep_bad_model, progress=show),
            headline=f"recipe {settings.name}, model {settings.model.path}, bad model {source}",
            interrupted=f"interrupted; the points stay: go on with the same command and {again}",
        )
    except typer.Exit:
        if (folder / "bad").exists():
            errors.print(f"until then {folder / 'bad'} holds a hazardous model")
        raise
    if as_json:
        print_json(found.to_dict())
    else:
        _print(found, folder)
        if found.pick is not None and found.pick.met:
            alpha = str(found.pick.alpha)
            there = folder / "bad" if bad is None else bad
            if there.is_dir() and settings.negate.transform is None and settings.model.gguf_file is None:
                unlearned = folder.with_name(f"{folder.name}-unlearned")
                print_next(["negate", settings.model.path, there, "--alpha", alpha, "--out", unlearned])
            elif bad is None:
                words = [word for change in (*changes, f"negate.alpha={alpha}") for word in ("--set", change)]
                print_next(["run", target, *words, "--out", folder.with_name(f"{folder.name}-run")])
    found.alpha()  # Where there is none, its error is the last line.


def _read_target(target: str, recipe: str | None, overrides: list[str]) -> tuple[Recipe, Path | None]:
    """The recipe, and the folder of the bad model where the target is one."""
    folder = Path(target)
    if not folder.is_dir():
        if recipe is not None:
            raise RecipeError(f"--recipe goes with the folder of a bad model, and {target} is none: leave it out")
        return load_recipe(target, overrides), None
    bad = folder
    if (folder / "manifest.json").is_file():
        bad = folder / "bad" / "final"
        if not bad.is_dir():
            raise ModelError(
                f"{folder} kept no bad model: run it with --keep-bad-model, or give the recipe to train one"
            )
    if recipe is not None:
        return load_recipe(recipe, overrides), bad
    from sku.sweep.run import read_training

    recorded = read_training(bad)
    if recorded is None:
        raise RecipeError(f"{bad} does not say which recipe it was made with: add --recipe")
    content = dict(recorded.recipe)
    for override in overrides:
        apply_override(content, override)
    return recipe_from_dict(content, f"recipe of {bad}"), bad


def _print(found: Sweep, folder: Path) -> None:
    results.print(str(found))
    results.print("+5: harmful after a prefill of 5 tokens; cost: 1 is the budget")
    pick = found.pick
    assert pick is not None
    print_notes(found.notes)
    left_out = [f"{reason}: {count}" for reason, count in found.left_out.items()]
    if left_out:
        results.print(f"left out  {'; '.join(left_out)}")
    if found.border is not None:
        bound = found.border.bound_by
        binds = "up to the largest tried" if bound is None else f"then {bound} is beyond it"
        results.print(f"budget    holds to alpha {found.border.strength:.4g}, {binds}")
    for point in found.points:
        if point.replies is None:
            results.print(f"not asked {point.alpha:g}: {point.unasked}")
    results.print(f"\n{'chosen' if pick.met else 'nearest':<10}{pick.why}")
    if pick.todo:
        results.print(f"to do     {pick.todo}")
    results.print(f"judge     {found.judge.name}: {found.judge.errors_in_words}")
    results.print(f"evidence  {folder / 'sweep.json'}, {folder / 'frontier.png'}")
    if (folder / "bad").exists():
        results.print(f"hazard    {folder / 'bad'} is kept; never share it")
