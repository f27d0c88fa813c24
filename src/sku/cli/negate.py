"""``sku negate``: stage 2 alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sku.cli.console import errors, progress_bars, results
from sku.cli.options import JsonOption
from sku.quiet import quiet_imports, quiet_libraries

if TYPE_CHECKING:
    import torch

    from sku.negate.record import Negation

DTYPES = ("same", "float32", "bfloat16", "float16")
ROUNDINGS = ("nearest", "stochastic")


def negate(
    base: Annotated[str, typer.Argument(help="Folder or hub id of the original model, or `embedded`.")],
    bad: Annotated[Path, typer.Argument(help="Folder of the bad model, its adapter, or a task vector.")],
    out: Annotated[Path, typer.Option("--out", help="New folder for the unlearned model.")],
    alpha: Annotated[float, typer.Option("--alpha", help="How much of the task vector to subtract.")] = 1.0,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Type of the result: same, float32, bfloat16, float16.")
    ] = "same",
    rounding: Annotated[
        str,
        typer.Option(
            "--rounding", help="nearest, or stochastic: small changes survive bfloat16 and float16 on average."
        ),
    ] = "nearest",
    seed: Annotated[int, typer.Option("--seed", help="Of the stochastic rounding.")] = 0,
    threads: Annotated[
        int | None, typer.Option("--threads", help="That read, compute and write; up to 4 where this is left out.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what a killed call had finished.")] = False,
    gguf_file: Annotated[
        str | None, typer.Option("--gguf-file", help="GGUF file inside BASE; it is negated in memory.")
    ] = None,
    operators: Annotated[
        list[str] | None,
        typer.Option("--operator", help="NAME={key: value} as in a recipe, repeatable; then negated in memory."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Stage 2: subtract the task vector of a bad model from the original weights, from file to file."""
    from sku.config import NegateConfig
    from sku.errors import RecipeError

    _check_choice("--dtype", dtype, DTYPES)
    _check_choice("--rounding", rounding, ROUNDINGS)
    NegateConfig(alpha=alpha)
    entries = [_operator(text) for text in operators or ()]

    quiet_imports()
    import torch

    from sku.negate.sources import model_folder
    from sku.negate.streaming import negate_folders

    output_dtype = None if dtype == "same" else getattr(torch, dtype)
    folder = None if gguf_file is not None or entries else model_folder(base)
    account: dict[str, Any] = {}
    if folder is None or not (folder / "config.json").is_file() or os.name != "posix":
        if rounding != "nearest" or resume:
            raise RecipeError("--rounding stochastic and --resume need a BASE in safetensors, and no --operator")
        record, account = _negated_in_memory(base, bad, out, alpha, output_dtype, gguf_file, entries)
    else:
        try:
            with progress_bars() as show:
                negated = negate_folders(
                    folder, model_folder(str(bad)), out, alpha, output_dtype=output_dtype,
                    rounding="stochastic" if rounding == "stochastic" else "nearest", seed=seed, threads=threads,
                    resume=resume, progress=lambda done, total: show("MiB", done >> 20, total >> 20),
                )  # fmt: skip
        except KeyboardInterrupt:
            errors.print("what is finished is kept: the same command with --resume goes on")
            raise
        record = negated.record
        if negated.left_out:
            errors.print(f"not copied from the base: {', '.join(negated.left_out)}", soft_wrap=True)
    if as_json:
        results.print_json(json.dumps({**record.to_dict(), **account}))
        return
    for name, value in record.to_dict().items():
        results.print(f"{name.replace('_', ' '):<20}{value}")
    results.print(f"\nunlearned model  {out}", soft_wrap=True)


def _check_choice(option: str, value: str, known: tuple[str, ...]) -> None:
    from sku.errors import RecipeError

    if value not in known:
        raise RecipeError(f"{option} is {value}; it must be {', '.join(known[:-1])} or {known[-1]}")


def _negated_in_memory(
    base: str,
    bad: Path,
    out: Path,
    alpha: float,
    output_dtype: torch.dtype | None,
    gguf_file: str | None,
    entries: list[dict[str, Any]],
) -> tuple[Negation, dict[str, Any]]:
    """For operators, and for weights that are no safetensors, such as GGUF."""
    quiet_libraries()
    from sku.config import ModelConfig
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
    model, record = negate_with_record(loaded.model, vector, alpha, output_dtype=output_dtype)
    save_unlearned(model, loaded.tokenizer, out)
    return record, {} if operated is None else {"operators": operated.records}


def _operator(text: str) -> dict[str, Any]:
    """``name={key: value}`` as a recipe's ``negate.operators`` holds it."""
    import yaml

    from sku.errors import RecipeError

    name, _, settings = text.partition("=")
    try:
        return {name: yaml.safe_load(settings) if settings else {}}
    except yaml.YAMLError:
        raise RecipeError(f"--operator {text}: {settings!r} is no YAML, such as {{energy: 0.9}}") from None
