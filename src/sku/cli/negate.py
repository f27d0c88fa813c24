"""``sku negate``: stage 2 alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sku.cli.console import carry_out, notes, print_json, print_next, results
from sku.cli.options import DryRunOption, JsonOption
from sku.config import read_yaml
from sku.errors import RecipeError
from sku.quiet import quiet_imports


def negate(
    base: Annotated[str, typer.Argument(help="Folder or hub id of the original model, or `embedded`.")],
    bad: Annotated[Path, typer.Argument(help="Folder of the bad model, its adapter, or a task vector.")],
    out: Annotated[Path, typer.Option("--out", help="New folder for the unlearned model.")],
    alpha: Annotated[float, typer.Option("--alpha", help="How much of the task vector to subtract.")] = 1.0,
    dtype: Annotated[
        Literal["same", "float32", "bfloat16", "float16"], typer.Option("--dtype", help="Type of the result.")
    ] = "same",
    rounding: Annotated[
        Literal["nearest", "stochastic"],
        typer.Option("--rounding", help="stochastic: small changes survive bfloat16 and float16 on average."),
    ] = "nearest",
    seed: Annotated[
        int, typer.Option("--seed", help="Of the stochastic rounding, and of what operators hold out and draw.")
    ] = 0,
    threads: Annotated[
        int | None, typer.Option("--threads", help="That read, compute and write; up to 4 where this is left out.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what a killed call had finished.")] = False,
    gguf_file: Annotated[str | None, typer.Option("--gguf-file", help="GGUF file in BASE; negated in memory.")] = None,
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
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Stage 2: subtract the task vector of a bad model from the original weights, from file to file."""
    quiet_imports()
    from sku.pipeline.negate import Subtraction, plan_negate

    chosen = tuple(_operator(text) for text in operators or ())
    subtraction = Subtraction(
        base=base, bad=bad, out=out, alpha=alpha, output_dtype=dtype, rounding=rounding, seed=seed, threads=threads,
        resume=resume, gguf_file=gguf_file, operators=chosen, forget=forget, normal=normal,
    )  # fmt: skip
    done = carry_out(
        plan_negate(subtraction),
        dry_run=dry_run,
        as_json=as_json,
        interrupted="interrupted; what is finished is kept: the same command with --resume goes on",
    )
    if done is None:
        return
    if done.left_out:
        notes.print(f"not copied from the base: {', '.join(done.left_out)}")
    if as_json:
        print_json(done.to_dict())
        return
    for name, value in done.record.to_dict().items():
        results.print(f"{name.replace('_', ' '):<20}{value}")
    results.print(f"\nunlearned model  {out}")
    options = [] if gguf_file is None else ["--set", f"model.gguf_file={gguf_file}"]
    print_next(["evaluate", out, "--base", base, *options, "--out", out.with_name(f"{out.name}-evaluation")])


def _operator(text: str) -> dict[str, Any]:
    """``name={key: value}`` as a recipe's ``negate.operators`` holds it."""
    name, _, settings = text.partition("=")
    try:
        return {name: read_yaml(settings) if settings else {}}
    except RecipeError:
        raise RecipeError(f"--operator {text}: {settings!r} is no YAML, such as {{energy: 0.9}}") from None
