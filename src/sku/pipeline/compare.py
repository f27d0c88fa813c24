"""Many methods or variants, one job after the other."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from sku.comparison.jobs import Job
from sku.comparison.run import RECORDS, FinishedComparison, check_jobs, record_path, run_comparison
from sku.comparison.search import search_judge
from sku.config import ModelConfig, Recipe, refuse_final
from sku.data.examples import ForgetRetainData
from sku.data.load import load_data
from sku.errors import SkuError
from sku.methods import method_named
from sku.methods.run import with_safe_dtype
from sku.pipeline.checks import (
    CheckedModel,
    CheckedTraining,
    check_evaluation,
    check_model,
    check_trained_model,
    check_training,
    data_notes,
)
from sku.pipeline.evaluate import readable_source
from sku.plan import CommandPlan
from sku.report.method_records import MethodRecord
from sku.report.method_tables import comparison_markdown
from sku.storage import check_can_be_made, named_disk_errors, write_text

TABLE_FILE = "table.md"
FIGURES = ("overview.png", "overview.svg"), ("trade_off.png", "trade_off.svg")
"""Files of the two pictures of a comparison."""


def plan_comparison(
    jobs: Sequence[Job],
    recipe: Recipe,
    out: Path,
    *,
    command: str,
    on_record: Callable[[MethodRecord, bool], None] | None = None,
) -> CommandPlan[FinishedComparison]:
    """Runs the jobs of a recipe; training is checked once for each method and variant, and a row that fails is a note.

    Raises:
        SkuError: Anything a user can mend.
    """
    refuse_final(recipe.data, "a comparison, which chooses strengths,")
    check_can_be_made(out)
    check_jobs(jobs, out)
    data = load_data(recipe.data, recipe.seed, forget_validation=recipe.search_validation)
    model = check_trained_model(recipe)
    asked = check_evaluation(recipe, model, data, readable_source(recipe.model))
    trained, failing = _checked_rows(jobs, data, out, {with_safe_dtype(recipe): model})
    notes = [*data_notes(data, model, None), *failing]
    if recipe.compare.search is not None:
        search_judge(recipe, data)
        points = len(recipe.compare.search.points)
        rows = len({*trained, "sku"})  # SKU's are those of the random direction, too.
        notes.append(f"compare.search trains each of {rows} rows {points} times more, to choose its settings")
    there = sum(record_path(out, job).is_file() for job in jobs)
    if there:
        notes.append(f"{there} records are in {out / RECORDS}: those that still fit are kept, the others made anew")
    return CommandPlan(
        command=command,
        out=out,
        settings={
            "recipe": recipe.name,
            "seed": recipe.seed,
            "model": model.describe(),
            "rows": ", ".join(dict.fromkeys(job.name for job in jobs)),
            "seeds": len({job.seed for job in jobs}),
            "steps": {name: found.steps for name, found in trained.items()},
            "asked": asked,
        },
        stages=(f"run {len(jobs)} jobs, one after the other", "draw tables and pictures"),
        writes=(f"{RECORDS}/", TABLE_FILE, *FIGURES[1], *FIGURES[0]),
        execute=lambda progress: run_comparison(
            jobs,
            out,
            # One bar a stage, not one a stage and job.
            progress=None
            if progress is None
            else lambda stage, done, total: progress(stage.rpartition(": ")[2], done, total),
            on_record=on_record,
        ),
        disk_bytes=max((found.peak_bytes for found in trained.values()), default=0),
        bad_model="deleted at the end" if any(_trains_bad_model(job) for job in jobs) else "none",
        examples=data.counts(),
        notes=tuple(notes),
    )


def _checked_rows(
    jobs: Sequence[Job], data: ForgetRetainData, out: Path, models: dict[ModelConfig, CheckedModel]
) -> tuple[dict[str, CheckedTraining], list[str]]:
    """Training of each row, and what of the others would fail: the rest is made all the same."""
    trained: dict[str, CheckedTraining] = {}
    failing: dict[str, str] = {}
    for job in jobs:
        if job.kind == "method" and job.name not in {*trained, *failing}:
            config = with_safe_dtype(job.recipe)
            if config not in models:
                models[config] = check_model(config)
            # Each with a skeleton of its own: an adapter is added to it.
            own = dataclasses.replace(models[config], skeleton=copy.deepcopy(models[config].skeleton))
            try:
                trained[job.name] = check_training(job.recipe, own, data, out)
            except SkuError as error:
                failing[job.name] = f"{job.name} would fail: {error}"
    return trained, list(failing.values())


def _trains_bad_model(job: Job) -> bool:
    """The random direction has the length of SKU's change, which is trained for it."""
    return job.kind == "random_direction" or (job.kind == "method" and method_named(job.recipe.method).negates)


def write_comparison(
    records: Sequence[MethodRecord], folder: Path, *, budget: float | None = None, order: Sequence[str] | None = None
) -> list[Path]:
    """Writes tables and pictures.

    Args:
        records: Of all rows and seeds.
        folder: Gets ``table.md``, and ``overview`` and ``trade_off`` as ``.png`` and ``.svg``.
        budget: Utility budget, drawn as a line in the trade-off.
        order: As in ``comparison_markdown``.

    Returns:
        The files written, in this order. The pictures are left out where no method has a complete record.

    Raises:
        EvaluationError: The records don't fit together.
        OutputError: The folder can't be written.
    """
    # Imports matplotlib, which a plan has no use for.
    from sku.report.method_overview import overview_figure
    from sku.report.trade_off import trade_off_figure

    table, overviews, trade_offs = (folder / TABLE_FILE, *([folder / name for name in names] for names in FIGURES))
    with named_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(table, comparison_markdown(records, order))
    if not any(record.status == "complete" and not record.control for record in records):
        return [table]
    return [
        table,
        *(overview_figure(records, path, order=order) for path in overviews),
        *(trade_off_figure(records, path, budget=budget, order=order) for path in trade_offs),
    ]
