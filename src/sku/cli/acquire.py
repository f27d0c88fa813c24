"""``sku acquire``: stage 1 alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sku.cli.console import progress_bars, results
from sku.cli.options import (
    ForgetOption,
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
) -> None:
    """Stage 1: train the bad model and keep it. It answers harmful prompts on purpose: never share it."""
    settings = resolve_recipe(recipe, model=model, forget=forget, retain=retain, seed=seed, overrides=overrides)

    quiet_libraries()
    from sku.pipeline import acquire_recipe
    from sku.processes import current_processes, end_when_the_launcher_says_so

    processes = current_processes()
    if processes.count > 1:
        end_when_the_launcher_says_so()
    if not processes.is_main:  # Of several, the first process speaks for all.
        acquire_recipe(settings, out)
        return
    with progress_bars() as show:
        log = acquire_recipe(settings, out, progress=show)
    for name, value in sorted(log[-1].items()):
        results.print(f"{name:<32}{value:.6g}")
    results.print(f"\nbad model  {out}  (hazardous, private to you)", soft_wrap=True)
    results.print(f"next       sku negate {settings.model.path} {out} --out unlearned", soft_wrap=True)
