"""``sku compare``, ``sku ablate``: many methods or variants on the same data, loop and evaluator."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sku.cli import options
from sku.cli.console import carry_out, notes, print_json, print_next, results
from sku.cli.tables import comparison_table
from sku.config import EMBEDDED
from sku.quiet import quiet_libraries

if TYPE_CHECKING:
    from sku.comparison.jobs import Job
    from sku.config import Recipe
    from sku.report.method_records import MethodRecord

GROUPS = ("modules", "preservation", "random_answers")
"""Names of ``sku.comparison.jobs.ABLATIONS``, which loads torch."""

SeedsOption = Annotated[
    int | None, typer.Option("--seeds", min=1, help="Number of training seeds, in place of the recipe's.")
]


def compare(
    recipe: options.RecipeArgument = EMBEDDED,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Names from `sku init`, with commas between; all if left out.",
            autocompletion=options.with_commas(options.method_names),
        ),
    ] = None,
    seeds: SeedsOption = None,
    model: options.ModelOption = None,
    forget: options.ForgetOption = None,
    retain: options.RetainOption = None,
    out: options.OutOption = None,
    seed: options.SeedOption = None,
    overrides: options.SetOption = None,
    dry_run: options.DryRunOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Compare methods and controls; a second call with the same --out goes on where the first stopped."""
    settings = options.resolve_recipe(
        recipe, model=model, forget=forget, retain=retain, seed=seed, overrides=overrides
    )
    quiet_libraries()
    from sku.comparison.jobs import comparison_jobs

    jobs = comparison_jobs(settings, options.names_in(methods), seeds)
    _carry_out(jobs, settings, out, "compare", dry_run=dry_run, as_json=as_json)


def ablate(
    recipe: options.RecipeArgument = EMBEDDED,
    groups: Annotated[
        str | None,
        typer.Option(
            help="modules, preservation, random_answers, with commas; all if left out.",
            autocompletion=options.with_commas(lambda: GROUPS),
        ),
    ] = None,
    seeds: SeedsOption = None,
    model: options.ModelOption = None,
    forget: options.ForgetOption = None,
    retain: options.RetainOption = None,
    out: options.OutOption = None,
    seed: options.SeedOption = None,
    overrides: options.SetOption = None,
    dry_run: options.DryRunOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Take SKU apart: without each module, with each preservation mode, with K of 1, 5 and 10."""
    settings = options.resolve_recipe(
        recipe, model=model, forget=forget, retain=retain, seed=seed, overrides=overrides
    )
    quiet_libraries()
    from sku.comparison.jobs import ablation_jobs

    jobs = ablation_jobs(settings, options.names_in(groups), seeds)
    _carry_out(jobs, settings, out, "ablate", dry_run=dry_run, as_json=as_json)


def _carry_out(
    jobs: Sequence[Job], recipe: Recipe, folder: Path | None, command: str, *, dry_run: bool, as_json: bool
) -> None:
    from sku.comparison.run import RECORDS
    from sku.pipeline.compare import plan_comparison, write_comparison
    from sku.report.method_records import read_records

    numbers = itertools.count(1)

    def tell(record: MethodRecord, was_there: bool) -> None:
        state = "kept" if was_there else record.status
        notes.print(f"{next(numbers)}/{len(jobs)} {record.name}, seed {record.seed}: {state}")

    out = folder or options.new_run_folder(command)
    model, again = recipe.model.path, shlex.join(["--out", str(out)])
    finished = carry_out(
        plan_comparison(jobs, recipe, out, command=f"sku {command}", on_record=tell),
        dry_run=dry_run,
        as_json=as_json,
        headline=f"recipe {recipe.name}, model {model}, {len(jobs)} jobs, one after the other, in {out}",
        interrupted=f"interrupted; what is finished stays: go on with the same command and {again}",
    )
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
        results.print(f"failed    {record.name}, seed {record.seed}: {record.failure}")
    results.print(f"\nevidence  {', '.join(str(path) for path in files)}")
    results.print(f"records   {out / RECORDS}")
    print_next(["results", out / RECORDS, "--brief"])
