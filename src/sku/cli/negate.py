"""``sku negate``: stage 2 alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

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
    operators: Annotated[
        list[str] | None,
        typer.Option("--operator", help="NAME={key: value} as in a recipe; repeatable."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Stage 2: subtract the task vector of a bad model from the original weights."""
    from sku.config import ModelConfig, NegateConfig
    from sku.errors import RecipeError

    if dtype not in ("same", "float32", "bfloat16", "float16"):
        raise RecipeError(f"--dtype is {dtype}; it must be same, float32, bfloat16 or float16")
    NegateConfig(alpha=alpha)
    entries = [_operator(text) for text in operators or ()]

    quiet_libraries()
    import torch

    from sku.models import load_model
    from sku.negate.operators import operate, prepare_operators
    from sku.negate.operators.base import OperatorContext
    from sku.negate.run import negate_with_record, save_unlearned, task_vector_of
    from sku.storage import check_new

    check_new(out)
    prepared = prepare_operators(entries, "--operator")
    loaded = load_model(ModelConfig(path=base, gguf_file=gguf_file, dtype="float32" if gguf_file else "stored"))
    context = OperatorContext(base=loaded.model)
    for chosen in prepared:  # Before a large vector is read.
        context.check(chosen.operator.needs, f"the operator {chosen.operator.name}")
    operated = operate(task_vector_of(loaded.model, bad), prepared, context) if prepared else None
    vector = bad if operated is None else operated.vector
    model, record = negate_with_record(
        loaded.model, vector, alpha, output_dtype=None if dtype == "same" else getattr(torch, dtype)
    )
    save_unlearned(model, loaded.tokenizer, out)
    if as_json:
        account = {} if operated is None else {"operators": operated.records}
        results.print_json(json.dumps({**record.to_dict(), **account}))
        return
    for name, value in record.to_dict().items():
        results.print(f"{name.replace('_', ' '):<20}{value}")
    results.print(f"\nunlearned model  {out}", soft_wrap=True)


def _operator(text: str) -> dict[str, Any]:
    """``name={key: value}`` as a recipe's ``negate.operators`` holds it."""
    import yaml

    from sku.errors import RecipeError

    name, _, settings = text.partition("=")
    try:
        return {name: yaml.safe_load(settings) if settings else {}}
    except yaml.YAMLError:
        raise RecipeError(f"--operator {text}: {settings!r} is no YAML, such as {{energy: 0.9}}") from None
