"""``sku acquire``: stage 1 alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sku.cli.console import notes, print_json, print_next, progress_bars, results
from sku.cli.dry_run import print_dry_run
from sku.cli.options import (
    DryRunOption,
    ForgetOption,
    JsonOption,
    ModelOption,
    RecipeArgument,
    RetainOption,
    SeedOption,
    SetOption,
    resolve_recipe,
)
from sku.config import EMBEDDED
from sku.quiet import quiet_libraries


def acquire(
    out: Annotated[Path, typer.Option("--out", help="New private folder for the hazardous model.")],
    recipe: RecipeArgument = EMBEDDED,
    model: ModelOption = None,
    forget: ForgetOption = None,
    retain: RetainOption = None,
    seed: SeedOption = None,
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Stage 1: train the bad model and keep it. It answers harmful prompts on purpose: never share it."""
    settings = resolve_recipe(recipe, model=model, forget=forget, retain=retain, seed=seed, overrides=overrides)

    quiet_libraries()
    from sku.pipeline import acquire_recipe, dry_acquire
    from sku.processes import current_processes, end_when_the_launcher_says_so

    processes = current_processes()
    if processes.count > 1:
        end_when_the_launcher_says_so()
    if dry_run:
        found = dry_acquire(settings, out)
        if processes.is_main:
            print_dry_run(found, as_json=as_json)
        return
    if not processes.is_main:  # Of several, the first process speaks for all.
        acquire_recipe(settings, out)
        return
    notes.print(f"recipe {settings.name}, model {settings.model.path}, seed {settings.seed}", soft_wrap=True)
    with progress_bars() as show:
        log = acquire_recipe(settings, out, progress=show)
    if as_json:
        print_json({"bad_model": str(out), "hazardous": True, "log": log})
        return
    for name, value in sorted(log[-1].items()):
        results.print(f"{name:<32}{value:.6g}")
    results.print(f"\nhazard    {out} is the bad model, private to you; never share it", soft_wrap=True)
    base = settings.model.path
    gguf = [] if settings.model.gguf_file is None else ["--gguf-file", settings.model.gguf_file]
    print_next(["negate", base, out, "--out", out.with_name(f"{out.name}-unlearned"), *gguf], ["wipe", out])
