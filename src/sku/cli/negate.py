"""``sku negate``: stage 2 alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sku.cli.console import results
from sku.cli.options import JsonOption
from sku.quiet import quiet_libraries


def negate(
    base: Annotated[str, typer.Argument(help="Folder or hub id of the original model, or `embedded`.")],
    bad: Annotated[Path, typer.Argument(help="Folder of the bad model, its adapter, or a task vector.")],
    out: Annotated[Path, typer.Option("--out", help="New folder for the unlearned model.")],
    alpha: Annotated[float, typer.Option("--alpha", help="How much of the task vector to subtract.")] = 1.0,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Type of the result: same, float32, bfloat16, float16.")
    ] = "same",
    gguf_file: Annotated[str | None, typer.Option("--gguf-file", help="GGUF file inside BASE.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Stage 2: subtract the task vector of a bad model from the original weights."""
    from sku.config import ModelConfig, NegateConfig
    from sku.errors import RecipeError

    if dtype not in ("same", "float32", "bfloat16", "float16"):
        raise RecipeError(f"--dtype is {dtype}; it must be same, float32, bfloat16 or float16")
    NegateConfig(alpha=alpha)

    quiet_libraries()
    import torch

    from sku.models import load_model
    from sku.negate.run import negate_with_record, save_unlearned
    from sku.storage import check_new

    check_new(out)
    loaded = load_model(ModelConfig(path=base, gguf_file=gguf_file, dtype="float32" if gguf_file else "stored"))
    model, record = negate_with_record(
        loaded.model, bad, alpha, output_dtype=None if dtype == "same" else getattr(torch, dtype)
    )
    save_unlearned(model, loaded.tokenizer, out)
    if as_json:
        results.print_json(json.dumps(record.to_dict()))
        return
    for name, value in record.to_dict().items():
        results.print(f"{name.replace('_', ' '):<20}{value}")
    results.print(f"\nunlearned model  {out}", soft_wrap=True)
