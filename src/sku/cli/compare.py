"""``sku compare``, ``sku ablate``: many methods or variants on the same data, loop and evaluator."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sku.cli.console import comparison_table, errors, print_headline, progress_bars, results
from sku.cli.options import (
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
        str | None, typer.Option("--methods", help="Names from `sku methods`, with commas between; all if left out.")
    ] = None,
    seeds: SeedsOption = None,
    model: ModelOption = None,
    forget: ForgetOption = None,
    retain: RetainOption = None,
    out: OutOption = None,
    seed: SeedOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare methods and controls; a second call with the same --out goes on where the first stopped."""
    settings = resolve_recipe(recipe, model=model, forget=forget, retain=retain, seed=seed, overrides=overrides)
    quiet_libraries()
    from sku.comparison.jobs import comparison_jobs

    _run(comparison_jobs(settings, _names(methods), seeds), settings, out or new_run_folder("compare"), as_json)


def ablate(
    recipe: RecipeArgument = EMBEDDED,
    groups: Annotated[
        str | None,
        typer.Option("--groups", help="modules, preservation, random_answers, compat, with commas; all if left out."),
    ] = None,
    seeds: SeedsOption = None,
    model: ModelOption = None,
    forget: ForgetOption = None,
    retain: RetainOption = None,
    out: OutOption = None,
    seed: SeedOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take SKU apart: without each module, with each preservation mode, with K of 1, 5 and 10."""
    settings = resolve_recipe(recipe, model=model, forget=forget, retain=retain, seed=seed, overrides=overrides)
    quiet_libraries()
    from sku.comparison.jobs import ablation_jobs

    _run(ablation_jobs(settings, _names(groups), seeds), settings, out or new_run_folder("ablate"), as_json)


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _run(jobs: Sequence[Job], recipe: Recipe, out: Path, as_json: bool) -> None:
    from sku.comparison.in_process import RECORDS
    from sku.comparison.run import run_comparison
    from sku.report.comparison_report import write_comparison
    from sku.report.method_records import read_records

    print_headline(f"recipe {recipe.name}, model {recipe.model.path}, {len(jobs)} jobs, one after the other, in {out}")
    count = 0

    def tell(record: MethodRecord, was_there: bool) -> None:
        nonlocal count
        count += 1
        state = "kept" if was_there else record.status
        errors.print(f"{count}/{len(jobs)} {record.name}, seed {record.seed}: {state}", soft_wrap=True)

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
        errors.print(f"interrupted; what is finished stays: go on with the same command and --out {out}")
        raise typer.Exit(130) from None
    if finished.reused:
        errors.print(f"{finished.reused} of {len(jobs)} records were there already and still fit")
    # Records of other rows in the folder, from an earlier call with other methods, stay in the tables.
    records = read_records(out / RECORDS)
    order = list(dict.fromkeys(job.name for job in jobs))
    files = write_comparison(records, out, budget=recipe.compare.utility_budget, order=order)
    if as_json:
        results.print_json(json.dumps([record.to_dict() for record in records]))
        return
    results.print(comparison_table(records, order))
    failed = [record for record in finished.records if record.status == "failed"]
    for record in failed:
        results.print(f"failed    {record.name}, seed {record.seed}: {record.failure}", soft_wrap=True)
    results.print(f"\nevidence  {', '.join(str(path) for path in files)}", soft_wrap=True)
    results.print(f"records   {out / RECORDS}", soft_wrap=True)
