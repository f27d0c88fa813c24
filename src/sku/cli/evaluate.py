"""``sku evaluate``: measure a model, alone or against its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sku.cli import options
from sku.cli.console import carry_out, print_json, print_next, results
from sku.cli.judge import agreement_lines
from sku.cli.tables import print_measured
from sku.config import EMBEDDED
from sku.quiet import quiet_libraries


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of the model to measure.")],
    out: Annotated[Path, typer.Option("--out", help="Private folder for replies and results; rows in it are reused.")],
    recipe: options.RecipeArgument = EMBEDDED,
    base: Annotated[
        str | None, typer.Option("--base", help="Original model to compare with; the recipe's where left out.")
    ] = None,
    forget: options.ForgetOption = None,
    retain: options.RetainOption = None,
    judge: options.JudgeOption = None,
    seed: options.SeedOption = None,
    overrides: options.SetOption = None,
    attacks: Annotated[
        str | None,
        typer.Option(
            "--attacks",
            help="Attacks to run on both models, with commas: prefill, paraphrase, template, relearn.",
        ),
    ] = None,
    precisions: Annotated[
        str | None,
        typer.Option(
            "--precisions",
            help="Formats to round MODEL's weights to before it is asked again, with commas: bf16, fp16, int8, nf4.",
        ),
    ] = None,
    allow_hazardous: Annotated[
        bool, typer.Option("--allow-hazardous", help="Measure a model that is marked as the bad one of stage 1 too.")
    ] = False,
    dry_run: options.DryRunOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Measure MODEL and its base on the prompts of a recipe, and compare them."""
    overrides = list(overrides or [])
    for key, names in (("attacks", attacks), ("precisions", precisions)):
        if names is not None:
            overrides.append(f"evaluate.{key}={json.dumps(options.names_in(names))}")
    settings = options.resolve_recipe(
        recipe, model=base, forget=forget, retain=retain, seed=seed, judge=judge, overrides=overrides
    )

    quiet_libraries()
    from sku.pipeline.evaluate import plan_evaluation
    from sku.processes import current_processes

    plan = plan_evaluation(settings, model, out, allow_hazardous=allow_hazardous)
    measured = carry_out(plan, dry_run=dry_run, as_json=as_json, is_main=current_processes().is_main)
    if measured is None:
        return
    comparison = measured.comparison
    if as_json:
        sides = {"base": comparison.base.to_dict(), "model": comparison.unlearned.to_dict()}
        verdict = {"verdict": comparison.verdict.to_dict(), "notes": comparison.notes}
        print_json(sides | verdict | measured.reports())
        return
    print_measured(measured, agreement_lines(comparison.unlearned))
    results.print(f"\nevidence  {out}")
    print_next(["judge", "export", out, "--out", out.with_name(f"{out.name}-labels.csv")])
