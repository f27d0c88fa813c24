"""``sku compare``, ``sku ablate``: many methods or variants on the same data, loop and evaluator."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sku.cli import completion
from sku.cli.console import (
    comparison_table,
    errors,
    notes,
    print_headline,
    print_json,
    print_next,
    progress_bars,
    results,
)
from sku.cli.dry_run import print_dry_run
from sku.cli.inputs import check_judge
from sku.cli.options import (
    DryRunOption,
    ForgetOption,
    JsonOption,
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
    from sku.comparison.jobs import Job
    from sku.config import Recipe
    from sku.report.method_records import MethodRecord

SeedsOption = Annotated[
    int | None, typer.Option("--seeds", min=1, help="Number of training seeds, in place of the recipe's.")
]


def compare(
    recipe: RecipeArgument = EMBEDDED,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            help="Names from `sku methods`, with commas between; all if left out.",
            autocompletion=completion.method_list,
        ),
    ] = None,
    seeds: SeedsOption = None,
    model: ModelOption = None,
    forget: ForgetOption = None,
    retain: RetainOption = None,
    out: OutOption = None,
    seed: SeedOption = None,
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare methods and controls; a second call with the same --out goes on where the first stopped."""
    settings = resolve_recipe(recipe, model=model, forget=forget, retain=retain, seed=seed, overrides=overrides)
    check_judge(settings)
    quiet_libraries()
    from sku.comparison.jobs import comparison_jobs

    jobs, folder = comparison_jobs(settings, _names(methods), seeds), out or new_run_folder("compare")
    if dry_run:
        _dry_run(jobs, settings, folder, "sku compare", as_json=as_json)
    else:
        _run(jobs, settings, folder, as_json)


def ablate(
    recipe: RecipeArgument = EMBEDDED,
    groups: Annotated[
        str | None,
        typer.Option(
            "--groups",
            help="modules, preservation, random_answers, with commas; all if left out.",
            autocompletion=completion.ablation_list,
        ),
    ] = None,
    seeds: SeedsOption = None,
    model: ModelOption = None,
    forget: ForgetOption = None,
    retain: RetainOption = None,
    out: OutOption = None,
    seed: SeedOption = None,
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take SKU apart: without each module, with each preservation mode, with K of 1, 5 and 10."""
    settings = resolve_recipe(recipe, model=model, forget=forget, retain=retain, seed=seed, overrides=overrides)
    check_judge(settings)
    quiet_libraries()
    from sku.comparison.jobs import ablation_jobs

    jobs, folder = ablation_jobs(settings, _names(groups), seeds), out or new_run_folder("ablate")
    if dry_run:
        _dry_run(jobs, settings, folder, "sku ablate", as_json=as_json)
    else:
        _run(jobs, settings, folder, as_json)


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _dry_run(jobs: Sequence[Job], recipe: Recipe, out: Path, command: str, *, as_json: bool) -> None:
    from sku.pipeline import dry_comparison

    print_dry_run(dry_comparison(jobs, recipe, out, command=command), as_json=as_json)


def _run(jobs: Sequence[Job], recipe: Recipe, out: Path, as_json: bool) -> None:
    from sku.comparison.run import RECORDS, run_comparison
    from sku.report.comparison_report import write_comparison
    from sku.report.method_records import read_records

    print_headline(f"recipe {recipe.name}, model {recipe.model.path}, {len(jobs)} jobs, one after the other, in {out}")
    count = 0

    def tell(record: MethodRecord, was_there: bool) -> None:
        nonlocal count
        count += 1
        state = "kept" if was_there else record.status
        notes.print(f"{count}/{len(jobs)} {record.name}, seed {record.seed}: {state}", soft_wrap=True)

    try:
        with progress_bars() as show:
            finished = run_comparison(
                jobs,
                out,
                # One bar a stage, not one a stage and job.
                progress=lambda stage, done, total: show(stage.rpartition(": ")[2], done, total),
                on_record=tell,
            )
    except KeyboardInterrupt:
        again = shlex.join(["--out", str(out)])
        errors.print(f"interrupted; what is finished stays: go on with the same command and {again}", soft_wrap=True)
        raise typer.Exit(130) from None
    if finished.reused:
        notes.print(f"{finished.reused} of {len(jobs)} records were there already and still fit")
    # Records of other rows in the folder, from an earlier call with other methods, stay in the tables.
    records = read_records(out / RECORDS)
    order = list(dict.fromkeys(job.name for job in jobs))
    files = write_comparison(records, out, budget=recipe.compare.utility_budget, order=order)
    if as_json:
        print_json([record.to_dict() for record in records])
        return
    results.print(comparison_table(records, order))
    failed = [record for record in finished.records if record.status == "failed"]
    for record in failed:
        results.print(f"failed    {record.name}, seed {record.seed}: {record.failure}", soft_wrap=True)
    results.print(f"\nevidence  {', '.join(str(path) for path in files)}", soft_wrap=True)
    results.print(f"records   {out / RECORDS}", soft_wrap=True)
    print_next(["results", out / RECORDS, "--brief"])
