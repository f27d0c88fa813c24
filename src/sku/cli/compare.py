"""``sku compare``: many methods, or variants of SKU, on the same data, loop and evaluator."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated

import typer

from sku.cli import options
from sku.cli.console import notes, print_headline, print_json, print_next, results
from sku.config import EMBEDDED
from sku.errors import RecipeError
from sku.progress import quiet_libraries

TABLE_FILE = "table.md"
FIGURES = ("overview.png", "overview.svg")


def compare(
    recipe: options.RecipeArgument = EMBEDDED,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Names from `sku init`, with commas between; all if left out.",
            autocompletion=options.method_names,
        ),
    ] = None,
    ablate: Annotated[
        str | None,
        typer.Option(
            help="Take SKU apart instead: modules, preservation, random_answers, with commas; or all.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Number of training seeds.")] = 3,
    model: options.ModelOption = None,
    forget: options.ForgetOption = None,
    retain: options.RetainOption = None,
    out: options.OutOption = None,
    seed: options.SeedOption = None,
    overrides: options.SetOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Compare methods and controls, a run each; a second call with the same --out goes on where the first stopped."""
    if ablate is not None and methods is not None:
        raise RecipeError("--ablate compares variants of SKU and --methods methods: leave one out")
    settings = options.resolve_recipe(
        recipe, model=model, forget=forget, retain=retain, seed=seed, overrides=overrides
    )
    quiet_libraries()
    from sku.comparison import ablation_rows, comparison_rows, run_comparison, seeds_of
    from sku.model_files import locate_model

    locate_model(settings.model)  # Or every run would fail for it.
    if ablate is None:
        rows = comparison_rows(settings, options.names_in(methods))
    else:
        rows = ablation_rows(settings, () if ablate == "all" else options.names_in(ablate))
    folder, trained = out or options.new_run_folder("compare"), seeds_of(settings, seeds)
    total, done = len(rows) * len(trained), 0
    print_headline(
        f"recipe {settings.name}, model {settings.model.path}, {total} runs, one after the other, in {folder}"
    )

    def tell(name: str, state: str, failure: str) -> None:
        nonlocal done
        done += 1
        notes.print(f"{done}/{total} {name}: {state}{failure and f', {failure}'}")

    try:
        run_comparison(rows, trained, folder, tell)
    except KeyboardInterrupt:
        again = shlex.join(["--out", str(folder)])
        notes.print(f"interrupted; what is finished stays: go on with the same command and {again}")
        raise
    _print(folder, as_json=as_json)


def _print(folder: Path, *, as_json: bool) -> None:
    """Tables and picture of all rows in a folder, those of an earlier call with other methods too."""
    from sku.report import method_tables
    from sku.report.method_overview import overview_figure
    from sku.report.method_records import read_records, run_name
    from sku.storage import write_text

    records = read_records(folder)
    failed = {run_name(record.name, record.seed): record.failure for record in records if record.failure is not None}
    files = [folder / TABLE_FILE]
    write_text(files[0], method_tables.comparison_markdown(records))
    if len(failed) < len(records):
        files += [overview_figure(records, folder / name) for name in FIGURES]
    if as_json:
        rows = [dataclasses.asdict(row) for row in method_tables.comparison_rows(records)]
        print_json({"rows": rows, "failed": failed})
        return
    results.print(method_tables.brief_markdown(records))
    for name, failure in failed.items():
        results.print(f"failed    {name}: {failure}")
    results.print(f"\nevidence  {', '.join(str(path) for path in files)}")
    print_next(["results", folder, "--brief"])
