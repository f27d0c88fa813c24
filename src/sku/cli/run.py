"""``sku run``: the whole job."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sku.cli.console import (
    before_after_table,
    errors,
    print_attacks,
    print_comparison_notes,
    print_headline,
    print_json,
    print_next,
    print_precisions,
    print_verdict,
    progress_bars,
    results,
    shown_messages,
)
from sku.cli.dry_run import print_dry_run
from sku.cli.inputs import check_judge
from sku.cli.judge import agreement_lines
from sku.cli.loudness import is_verbose
from sku.cli.options import (
    DryRunOption,
    ForgetOption,
    JsonOption,
    JudgeOption,
    ModelOption,
    OutOption,
    RecipeArgument,
    RetainOption,
    SeedOption,
    SetOption,
    new_run_folder,
    resolve_recipe,
)
from sku.config import EMBEDDED
from sku.quiet import quiet_libraries

if TYPE_CHECKING:
    from sku.config import Recipe
    from sku.pipeline import FinishedRun


def run(
    recipe: RecipeArgument = EMBEDDED,
    model: ModelOption = None,
    forget: ForgetOption = None,
    retain: RetainOption = None,
    out: OutOption = None,
    judge: JudgeOption = None,
    seed: SeedOption = None,
    overrides: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")] = False,
    keep_bad_model: Annotated[
        bool, typer.Option("--keep-bad-model", help="Keep the hazardous model of stage 1 in the run folder.")
    ] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Unlearn: stage 1, stage 2, and the evidence. Without arguments: the embedded model and world."""
    settings = resolve_recipe(
        recipe,
        model=model,
        forget=forget,
        retain=retain,
        seed=seed,
        judge=judge,
        overrides=[*(overrides or []), *(["keep_bad_model=true"] if keep_bad_model else [])],
    )
    check_judge(settings)
    quiet_libraries()
    from sku.pipeline import dry_run as check_run
    from sku.pipeline import run_recipe  # Imports torch: only when a command really runs.
    from sku.processes import current_processes, end_when_the_launcher_says_so
    from sku.storage import check_place

    processes = current_processes()
    if processes.count > 1:
        end_when_the_launcher_says_so()
    folder = processes.on_main(lambda: out or new_run_folder(settings.name))
    if dry_run:
        found = check_run(settings, folder, resume=resume)
        if processes.is_main:
            print_dry_run(found, as_json=as_json)
        return
    check_place(folder)
    if not processes.is_main:  # Of several, the first process speaks for all.
        run_recipe(settings, folder, resume=resume)
        return
    method = "" if settings.method == "sku" else f", method {settings.method}"
    print_headline(f"recipe {settings.name}, model {settings.model.path}, seed {settings.seed}{method}")
    _warn_of_memory(settings)
    try:
        with shown_messages(), progress_bars() as show:
            finished = run_recipe(settings, folder, resume=resume, progress=show)
    except KeyboardInterrupt:
        again = shlex.join(["--out", str(folder), "--resume"])
        errors.print(f"interrupted; go on with the same command and {again}", soft_wrap=True)
        _tell_of_checkpoints(folder)
        raise typer.Exit(130) from None
    except Exception:
        _tell_of_checkpoints(folder)
        raise
    if as_json:
        print_json(json.loads((folder / "results.json").read_text(encoding="utf-8")))
    else:
        _print_finished(finished, folder)


def _warn_of_memory(recipe: Recipe) -> None:
    """Asks the plan where there is a GPU. It takes every row for as long as it may be: no reason to refuse a run."""
    from sku.models import pick_device
    from sku.pipeline import memory_fit

    if pick_device(recipe.model.device).type == "cuda":
        found = memory_fit(recipe)
        if isinstance(found, str) or not found.fits:
            print_headline(f"memory: {found if isinstance(found, str) else found.describe()}")


def _print_finished(finished: FinishedRun, folder: Path) -> None:
    """What was measured, where everything lies, and what to do next."""
    from sku.report.tables import before_after_rows

    print_verdict(finished.comparison.verdict.line)
    results.print()
    results.print(before_after_table(before_after_rows(finished.comparison)))
    print_comparison_notes(finished.comparison, verbose=is_verbose())
    if finished.precisions is not None:
        print_precisions(finished.precisions)
    if finished.attacks is not None:
        print_attacks(finished.attacks)
    seconds = finished.manifest["seconds"]
    results.print(f"\n{json.dumps(seconds)[1:-1]} seconds, {sum(seconds.values()):.0f} in all".replace('"', ""))
    if "stage_1" in finished.manifest:
        results.print(f"stage 1   {finished.manifest['stage_1']['line']}", soft_wrap=True)
    if "sweep" in finished.manifest:
        results.print(f"chosen    {finished.manifest['sweep']['why']}", soft_wrap=True)
    results.print(f"model     {folder / 'unlearned'}", soft_wrap=True)
    for adapter in (folder / "negated_adapter", folder / "adapter"):
        if adapter.exists():
            results.print(f"adapter   {adapter}  (the same, unmerged)", soft_wrap=True)
    results.print(f"evidence  {folder / 'results.json'}, {folder / 'before_after.png'}", soft_wrap=True)
    if (folder / "bad").exists():
        results.print(f"hazard    {folder / 'bad'} is kept; never share it", soft_wrap=True)
    card = finished.comparison.unlearned.judge
    results.print(f"judge     {card.name}: {card.errors_in_words}", soft_wrap=True)
    for line in agreement_lines(finished.comparison.unlearned):
        results.print(line, soft_wrap=True)
    print_next(*_next_commands(folder))


def _next_commands(folder: Path) -> list[list[str | Path]]:
    """The report, labels by people, and what can be done with a bad model that was kept."""
    labels = folder.with_name(f"{folder.name}-labels.csv")
    commands: list[list[str | Path]] = [["report", folder], ["judge", "export", folder, "--out", labels]]
    if (folder / "bad").exists():
        commands += [["sweep", folder], ["wipe", folder]]
    return commands


def _tell_of_checkpoints(folder: Path) -> None:
    """What an unfinished run leaves is hazardous: whoever doesn't go on with it should know."""
    if (folder / "bad").exists():
        removed = shlex.join(["sku", "wipe", str(folder)])
        errors.print(
            f"until the run is finished {folder / 'bad'} holds hazardous checkpoints; {removed} removes them",
            soft_wrap=True,
        )
