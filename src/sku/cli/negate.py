"""``sku negate``: stage 2 alone."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
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
    seed: Annotated[
        int, typer.Option("--seed", help="Of the stochastic rounding, and of what operators hold out and draw.")
    ] = 0,
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
    forget: Annotated[
        str | None,
        typer.Option("--forget", help="File, folder or hub id of harmful pairs, for operators that look at them."),
    ] = None,
    normal: Annotated[
        str | None,
        typer.Option("--normal", help="File, folder or hub id of normal pairs, for operators that look at them."),
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
    if not entries:
        _check_read(forget, normal, set())
    folder = None if gguf_file is not None or entries else model_folder(base)
    account: dict[str, Any] = {}
    if folder is None or not (folder / "config.json").is_file() or os.name != "posix":
        if rounding != "nearest" or resume:
            raise RecipeError("--rounding stochastic and --resume need a BASE in safetensors, and no --operator")
        data = _OperatorData(forget=forget, normal=normal, seed=seed)
        record, account = _negated_in_memory(base, bad, out, alpha, output_dtype, gguf_file, entries, data)
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
    data: _OperatorData,
) -> tuple[Negation, dict[str, Any]]:
    """For operators, and for weights that are no safetensors, such as GGUF."""
    quiet_libraries()
    from sku.config import ModelConfig, SourceConfig
    from sku.data.load import load_parts
    from sku.models import load_model
    from sku.negate.operators import operate, prepare_operators
    from sku.negate.operators.base import DATA_OPTIONS, OperatorContext
    from sku.negate.operators.context import context_of
    from sku.negate.run import negate_with_record, save_unlearned, task_vector_of
    from sku.storage import check_new

    check_new(out)
    prepared = prepare_operators(entries, "--operator")
    _check_read(
        data.forget, data.normal, {DATA_OPTIONS[need] for chosen in prepared for need in chosen.operator.needs}
    )
    forget, normal = (None if path is None else SourceConfig(path=path) for path in (data.forget, data.normal))
    texts = None if forget is None and normal is None else load_parts(forget, normal, seed=data.seed)
    loaded = load_model(ModelConfig(path=base, gguf_file=gguf_file, dtype="float32" if gguf_file else "stored"))
    context = OperatorContext(base=loaded.model, seed=data.seed)
    if texts is not None:
        context = context_of(loaded.model, loaded.tokenizer, texts, seed=data.seed)
    for chosen in prepared:  # Before a large vector is read.
        context.check(chosen.operator.needs, f"the operator {chosen.operator.name}")
    operated = operate(task_vector_of(loaded.model, bad), prepared, context) if prepared else None
    vector = bad if operated is None else operated.vector
    model, record = negate_with_record(loaded.model, vector, alpha, output_dtype=output_dtype)
    save_unlearned(model, loaded.tokenizer, out)
    return record, {} if operated is None else {"operators": operated.records}


@dataclass(frozen=True, kw_only=True)
class _OperatorData:
    """What operators look at."""

    forget: str | None
    normal: str | None
    seed: int


def _check_read(forget: str | None, normal: str | None, read: set[str]) -> None:
    """Refuses data that no operator looks at."""
    from sku.errors import RecipeError

    for option, given, kind in (("--forget", forget, "harmful"), ("--normal", normal, "normal")):
        if given is not None and option not in read:
            raise RecipeError(f"{option} is read by operators that look at {kind} examples, and none is given")


def _operator(text: str) -> dict[str, Any]:
    """``name={key: value}`` as a recipe's ``negate.operators`` holds it."""
    import yaml

    from sku.config.yaml_text import read_yaml
    from sku.errors import RecipeError

    name, _, settings = text.partition("=")
    try:
        return {name: read_yaml(settings) if settings else {}}
    except yaml.YAMLError:
        raise RecipeError(f"--operator {text}: {settings!r} is no YAML, such as {{energy: 0.9}}") from None
