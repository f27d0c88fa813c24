"""``sku evaluate``: measure a model, alone or against its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sku.cli.console import before_after_table, progress_bars, results
from sku.cli.options import (
    ForgetOption,
    JsonOption,
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
    seed: SeedOption = None,
    backend: Annotated[
        str | None, typer.Option("--backend", help="What writes the replies: generate, generate_batch or vllm.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Drawn replies to each harmful prompt, for leak@k; 0 for none.")
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure MODEL and its base on the prompts of a recipe, and compare them."""
    given = {"evaluate.backend": backend, "evaluate.samples": samples}
    flags = [f"{key}={value}" for key, value in given.items() if value is not None]
    settings = resolve_recipe(
        recipe, model=base, forget=forget, retain=retain, seed=seed, overrides=[*flags, *(overrides or [])]
    )

    quiet_libraries()
    from sku.evaluate.processes import current_processes
    from sku.pipeline import evaluate_recipe
    from sku.report.tables import before_after_rows

    if not current_processes().is_main:  # Of several, the first process speaks for all.
        evaluate_recipe(settings, model, out)
        return
    with progress_bars() as show:
        comparison = evaluate_recipe(settings, model, out, progress=show)
    if as_json:
        results.print_json(json.dumps({"base": comparison.base.to_dict(), "model": comparison.unlearned.to_dict()}))
        return
    results.print(before_after_table(before_after_rows(comparison)))
    results.print(f"\nevidence  {out}", soft_wrap=True)
