"""``sku acquire``: stage 1 alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sku.cli import options
from sku.cli.console import carry_out, print_json, print_next, results
from sku.config import EMBEDDED
from sku.quiet import quiet_libraries


def acquire(
    out: Annotated[Path, typer.Option("--out", help="New private folder for the hazardous model.")],
    recipe: options.RecipeArgument = EMBEDDED,
    model: options.ModelOption = None,
    forget: options.ForgetOption = None,
    retain: options.RetainOption = None,
    seed: options.SeedOption = None,
    overrides: options.SetOption = None,
    dry_run: options.DryRunOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Stage 1: train the bad model and keep it. It answers harmful prompts on purpose: never share it."""
    settings = options.resolve_recipe(
        recipe, model=model, forget=forget, retain=retain, seed=seed, overrides=overrides, judged=False
    )

    quiet_libraries()
    from sku.pipeline.acquire import plan_acquire
    from sku.processes import current_processes, end_when_the_launcher_says_so

    processes = current_processes()
    if processes.count > 1:
        end_when_the_launcher_says_so()
    headline = f"recipe {settings.name}, model {settings.model.path}, seed {settings.seed}"
    plan = plan_acquire(settings, out)
    log = carry_out(plan, dry_run=dry_run, as_json=as_json, headline=headline, is_main=processes.is_main)
    if log is None:
        return
    if as_json:
        print_json({"bad_model": str(out), "hazardous": True, "log": log})
        return
    for name, value in sorted(log[-1].items()):
        results.print(f"{name:<32}{value:.6g}")
    results.print(f"\nhazard    {out} is the bad model, private to you; never share it")
    base = settings.model.path
    gguf = [] if settings.model.gguf_file is None else ["--gguf-file", settings.model.gguf_file]
    print_next(["negate", base, out, "--out", out.with_name(f"{out.name}-unlearned"), *gguf], ["wipe", out])
