"""``sku export``: a finished run's model for llama.cpp, Ollama, vLLM and PEFT."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from sku.cli.console import print_json, results
from sku.cli.options import JsonOption
from sku.errors import RecipeError
from sku.quiet import quiet_libraries


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished sku run.")],
    to: Annotated[
        Literal["gguf", "vllm", "adapter"],
        typer.Option("--to", help="gguf: llama.cpp and Ollama. vllm: what vLLM reads. adapter: the LoRA for PEFT."),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="New file or folder; RUN.gguf, RUN-adapter.")] = None,
    outtype: Annotated[str, typer.Option("--outtype", help="Weights of a GGUF file: f32, f16, bf16, q8_0.")] = "f16",
    converter: Annotated[
        Path | None,
        typer.Option("--converter", help="llama.cpp's convert_hf_to_gguf.py; else in $LLAMA_CPP or on the path."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write what another engine reads, load it back, and compare what it says with the unlearned model."""
    if to == "vllm" and out is not None:
        raise RecipeError("vLLM reads the run's own folder: leave --out out")
    quiet_libraries()
    from sku.export import to_adapter, to_gguf, to_vllm

    if to == "gguf":
        done = to_gguf(run, out or run.with_name(f"{run.name}.gguf"), converter=converter, outtype=outtype)
    elif to == "adapter":
        done = to_adapter(run, out or run.with_name(f"{run.name}-adapter"))
    else:
        done = to_vllm(run)
    if as_json:
        print_json({**dataclasses.asdict(done), "path": str(done.path)})
        return
    results.print(f"{to:<10}{done.path}")
    results.print(f"compared  {done.agreement.words}" if done.agreement else f"compared  no: {done.unchecked}")
    for place, words in enumerate(done.commands):
        results.print(f"{'' if place else 'use':<10}{shlex.join(words)}")
