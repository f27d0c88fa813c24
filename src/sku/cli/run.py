"""``sku run``, ``sku evaluate``: the whole job, and the measuring of a model alone."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sku.cli import options
from sku.cli.console import carry_out, errors, perform, print_headline, print_json, print_next, results
from sku.cli.tables import print_measured
from sku.config import EMBEDDED
from sku.quiet import quiet_libraries

if TYPE_CHECKING:
    from sku.pipeline.run import FinishedRun
    from sku.plan import CommandPlan


def run(
    recipe: options.RecipeArgument = EMBEDDED,
    model: options.ModelOption = None,
    forget: options.ForgetOption = None,
    retain: options.RetainOption = None,
    out: options.OutOption = None,
    judge: options.JudgeOption = None,
    seed: options.SeedOption = None,
    overrides: options.SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")] = False,
    base_of: Annotated[
        Path | None, typer.Option(help="Folder of a run, whose evaluation of the base model is taken where it fits.")
    ] = None,
    keep_bad_model: Annotated[
        bool, typer.Option("--keep-bad-model", help="Keep the hazardous model of stage 1 in the run folder.")
    ] = False,
    dry_run: options.DryRunOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Unlearn: stage 1, stage 2, and the evidence. Without arguments: the embedded model and world."""
    settings = options.resolve_recipe(
        recipe,
        model=model,
        forget=forget,
        retain=retain,
        seed=seed,
        judge=judge,
        overrides=[*(overrides or []), *(["keep_bad_model=true"] if keep_bad_model else [])],
    )
    quiet_libraries()
    from sku.pipeline.run import plan_run  # Imports torch: only when a command really runs.
    from sku.processes import current_processes, end_when_the_launcher_says_so

    processes = current_processes()
    end_when_the_launcher_says_so(processes)
    folder = processes.run_on_rank0(lambda: out or options.new_run_folder(settings.name))
    plan = plan_run(settings, folder, resume=resume, base_of=base_of)
    method = "" if settings.method == "sku" else f", method {settings.method}"
    headline = f"recipe {settings.name}, model {settings.model.path}, seed {settings.seed}{method}"
    if processes.is_main and not dry_run:
        _warn_of_memory(plan, settings.model.device)
    again = shlex.join(["--out", str(folder), "--resume"])
    try:
        finished = carry_out(
            plan,
            dry_run=dry_run,
            as_json=as_json,
            headline=headline,
            interrupted=f"interrupted; go on with the same command and {again}",
            is_main=processes.is_main,
        )
    except Exception:
        if processes.is_main:
            _tell_of_checkpoints(folder)
        raise
    if as_json:
        print_json(json.loads((folder / "results.json").read_text(encoding="utf-8")))
    else:
        _print_finished(finished, folder)


def _warn_of_memory(plan: CommandPlan[FinishedRun], device: str) -> None:
    """Asks the plan where there is a GPU. It takes every row for as long as it may be: no reason to refuse a run."""
    from sku.models import pick_device

    if plan.memory is not None and pick_device(device).type == "cuda":
        found = plan.memory()
        if not found.fits:
            print_headline(f"memory: {found.text}")


def _print_finished(finished: FinishedRun, folder: Path) -> None:
    """What was measured, where everything lies, and what to do next."""
    print_measured(finished)
    seconds = finished.manifest["seconds"]
    results.print(f"\n{json.dumps(seconds)[1:-1]} seconds, {sum(seconds.values()):.0f} in all".replace('"', ""))
    if "stage_1" in finished.manifest:
        results.print(f"stage 1   {finished.manifest['stage_1']['line']}")
    if "sweep" in finished.manifest:
        results.print(f"chosen    {finished.manifest['sweep']['why']}")
    results.print(f"model     {folder / 'unlearned'}")
    for adapter in (folder / "negated_adapter", folder / "adapter"):
        if adapter.exists():
            results.print(f"adapter   {adapter}  (the same, unmerged)")
    results.print(f"evidence  {folder / 'results.json'}, {folder / 'before_after.png'}")
    if (folder / "bad").exists():
        results.print(f"hazard    {folder / 'bad'} is kept; never share it")
    card = finished.comparison.unlearned.judge
    results.print(f"judge     {card.name}: {card.errors_in_words}")
    print_next(*_next_commands(folder))


def _next_commands(folder: Path) -> list[list[str | Path]]:
    """The report, a talk, labels by people, and what can be done with a bad model that was kept."""
    labels = folder.with_name(f"{folder.name}-labels.csv")
    commands: list[list[str | Path]] = [
        ["report", folder],
        ["chat", folder, "--web"],
        ["judge", "export", folder, "--out", labels],
    ]
    if (folder / "bad").exists():
        commands += [["sweep", folder], ["wipe", folder]]
    return commands


def _tell_of_checkpoints(folder: Path) -> None:
    """What an unfinished run leaves is hazardous: whoever doesn't go on with it should know."""
    if (folder / "bad").exists():
        removed = shlex.join(["sku", "wipe", str(folder)])
        errors.print(f"until the run is finished {folder / 'bad'} holds hazardous checkpoints; {removed} removes them")


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of the model to measure.")],
    out: Annotated[Path, typer.Option(help="Private folder for replies and results; rows in it are reused.")],
    recipe: options.RecipeArgument = EMBEDDED,
    base: Annotated[
        str | None, typer.Option(help="Original model to compare with; the recipe's where left out.")
    ] = None,
    forget: options.ForgetOption = None,
    retain: options.RetainOption = None,
    judge: options.JudgeOption = None,
    seed: options.SeedOption = None,
    overrides: options.SetOption = None,
    attacks: Annotated[
        str | None,
        typer.Option(help="Attacks to run on both models, with commas: paraphrase, template, rounding, relearn."),
    ] = None,
    allow_hazardous: Annotated[
        bool, typer.Option("--allow-hazardous", help="Measure a model that is marked as the bad one of stage 1 too.")
    ] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Measure MODEL and its base on the prompts of a recipe, and compare them."""
    overrides = list(overrides or [])
    if attacks is not None:
        overrides.append(f"evaluate.attacks={json.dumps(options.names_in(attacks))}")
    settings = options.resolve_recipe(
        recipe, model=base, forget=forget, retain=retain, seed=seed, judge=judge, overrides=overrides
    )

    quiet_libraries()
    from sku.pipeline.evaluate import run_evaluation
    from sku.processes import current_processes

    measured = perform(
        lambda show: run_evaluation(settings, model, out, allow_hazardous=allow_hazardous, progress=show),
        is_main=current_processes().is_main,
    )
    comparison = measured.comparison
    if as_json:
        sides = {"base": comparison.base.to_dict(), "model": comparison.unlearned.to_dict()}
        verdict = {"verdict": comparison.verdict.to_dict(), "notes": comparison.notes}
        print_json(sides | verdict | measured.reports())
        return
    print_measured(measured)
    results.print(f"\nevidence  {out}")
    print_next(["judge", "export", out, "--out", out.with_name(f"{out.name}-labels.csv")])
