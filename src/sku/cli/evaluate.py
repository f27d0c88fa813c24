"""``sku evaluate``: measure a model, alone or against its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sku.cli import options
from sku.cli.console import carry_out, print_json, print_next, results
from sku.cli.judge import agreement_lines
from sku.cli.tables import print_comparison
from sku.config import EMBEDDED
from sku.quiet import quiet_libraries

if TYPE_CHECKING:
    from sku.attacks.results import AttackReport
    from sku.evaluate.comparison import Comparison
    from sku.evaluate.precision_results import PrecisionReport


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
            listed = [name.strip() for name in names.split(",") if name.strip()]
            overrides.append(f"evaluate.{key}={json.dumps(listed)}")
    settings = options.resolve_recipe(
        recipe, model=base, forget=forget, retain=retain, seed=seed, judge=judge, overrides=overrides
    )

    quiet_libraries()
    from sku.attacks.results import read_attacks
    from sku.evaluate.precision_results import read_precisions
    from sku.pipeline.evaluate import plan_evaluation
    from sku.processes import current_processes

    plan = plan_evaluation(settings, model, out, allow_hazardous=allow_hazardous)
    comparison = carry_out(plan, dry_run=dry_run, as_json=as_json, is_main=current_processes().is_main)
    if comparison is None:
        return
    report = read_attacks(out) if settings.evaluate.attacks else None
    certificate = read_precisions(out) if settings.evaluate.precisions else None
    if as_json:
        print_json(_plain(comparison, certificate, report))
        return
    print_comparison(comparison, certificate, report, agreement_lines(comparison.unlearned))
    results.print(f"\nevidence  {out}")
    print_next(["judge", "export", out, "--out", out.with_name(f"{out.name}-labels.csv")])


def _plain(comparison: Comparison, certificate: PrecisionReport | None, report: AttackReport | None) -> dict[str, Any]:
    return {
        "base": comparison.base.to_dict(),
        "model": comparison.unlearned.to_dict(),
        "verdict": comparison.verdict.to_dict(),
        "notes": comparison.notes,
        **({} if certificate is None else {"precisions": certificate.to_dict()}),
        **({} if report is None else {"attacks": report.to_dict()}),
    }
