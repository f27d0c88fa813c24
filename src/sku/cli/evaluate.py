"""``sku evaluate``: measure a model, alone or against its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sku.cli.console import (
    before_after_table,
    print_attacks,
    print_comparison_notes,
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
    RecipeArgument,
    RetainOption,
    SeedOption,
    SetOption,
    resolve_recipe,
)
from sku.config import EMBEDDED
from sku.quiet import quiet_libraries


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of the model to measure.")],
    out: Annotated[Path, typer.Option("--out", help="Private folder for replies and results; rows in it are reused.")],
    recipe: RecipeArgument = EMBEDDED,
    base: Annotated[
        str | None, typer.Option("--base", help="Original model to compare with; the recipe's where left out.")
    ] = None,
    forget: ForgetOption = None,
    retain: RetainOption = None,
    judge: JudgeOption = None,
    seed: SeedOption = None,
    backend: Annotated[
        str | None, typer.Option("--backend", help="What writes the replies: generate, generate_batch or vllm.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Drawn replies to each harmful prompt, for leak@k; 0 for none.")
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option("--lm-eval", metavar="TASKS", help="Tasks of lm-evaluation-harness, such as mmlu,hellaswag."),
    ] = None,
    overrides: SetOption = None,
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
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure MODEL and its base on the prompts of a recipe, and compare them."""
    overrides = list(overrides or [])
    given = {"evaluate.backend": backend, "evaluate.samples": samples}
    overrides += [f"{key}={value}" for key, value in given.items() if value is not None]
    for key, names in (("lm_eval", lm_eval), ("attacks", attacks), ("precisions", precisions)):
        if names is not None:
            listed = [name.strip() for name in names.split(",") if name.strip()]
            overrides.append(f"evaluate.{key}={json.dumps(listed)}")
    settings = resolve_recipe(
        recipe, model=base, forget=forget, retain=retain, seed=seed, judge=judge, overrides=overrides
    )
    check_judge(settings)

    quiet_libraries()
    from sku.attacks.results import read_attacks
    from sku.evaluate.precision_results import read_precisions
    from sku.pipeline import dry_evaluate, evaluate_recipe
    from sku.processes import current_processes
    from sku.report.tables import before_after_rows

    if dry_run:
        found = dry_evaluate(settings, model, out, allow_hazardous=allow_hazardous)
        if current_processes().is_main:
            print_dry_run(found, as_json=as_json)
        return
    if not current_processes().is_main:  # Of several, the first process speaks for all.
        evaluate_recipe(settings, model, out, allow_hazardous=allow_hazardous)
        return
    with shown_messages(), progress_bars() as show:
        comparison = evaluate_recipe(settings, model, out, progress=show, allow_hazardous=allow_hazardous)
    report = read_attacks(out) if settings.evaluate.attacks else None
    certificate = read_precisions(out) if settings.evaluate.precisions else None
    if as_json:
        measured = {"base": comparison.base.to_dict(), "model": comparison.unlearned.to_dict()}
        tried = {} if report is None else {"attacks": report.to_dict()}
        rounded = {} if certificate is None else {"precisions": certificate.to_dict()}
        told = {"verdict": comparison.verdict.to_dict(), "notes": comparison.notes}
        print_json({**measured, **told, **rounded, **tried})
        return
    print_verdict(comparison.verdict.line)
    results.print()
    results.print(before_after_table(before_after_rows(comparison)))
    for line in agreement_lines(comparison.unlearned):
        results.print(line, soft_wrap=True)
    print_comparison_notes(comparison, verbose=is_verbose())
    if certificate is not None:
        print_precisions(certificate)
    if report is not None:
        print_attacks(report)
    results.print(f"\nevidence  {out}", soft_wrap=True)
    print_next(["judge", "export", out, "--out", out.with_name(f"{out.name}-labels.csv")])
