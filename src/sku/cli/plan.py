"""``sku plan``: what a run needs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sku.cli import options
from sku.cli.console import plain_table, print_json, results
from sku.config import EMBEDDED
from sku.errors import RecipeError
from sku.quiet import quiet_libraries

if TYPE_CHECKING:
    from sku.plan.estimate import Estimate, Suggestion


def plan(
    recipe: options.RecipeArgument = EMBEDDED,
    model: options.ModelOption = None,
    gpus: Annotated[int, typer.Option(help="Processes, each with a GPU of its own.")] = 1,
    gpu_memory: Annotated[float, typer.Option(help="GiB of each GPU.")] = 80.0,
    sharding: Annotated[
        Literal["ddp", "fsdp2", "zero3"], typer.Option(help="What several GPUs divide; ddp: nothing.")
    ] = "ddp",
    row_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a padded row; data.max_length where left out.")
    ] = None,
    answer_tokens: Annotated[
        int | None, typer.Option(help="Of them of the answer; data.max_answer_tokens where left out.")
    ] = None,
    peak_tflops: Annotated[
        float | None, typer.Option(help="Of a GPU at its best; an H100's 989 (bfloat16) or 67 (float32) if not.")
    ] = None,
    efficiency: Annotated[float, typer.Option(help="Share of the peak that training is assumed to reach.")] = 0.3,
    overrides: options.SetOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Estimate memory, disk and time of a run from its recipe and the model's config.json; no weight is loaded."""
    settings = options.resolve_recipe(recipe, model=model, overrides=overrides, check=False)
    if gpu_memory <= 0 or not 0 < efficiency <= 1 or (peak_tflops is not None and peak_tflops <= 0):
        raise RecipeError("--gpu-memory and --peak-tflops must be above 0, and --efficiency above 0 and at most 1")

    quiet_libraries()
    from sku.plan.estimate import GIB, estimated, suggestions
    from sku.plan.fit import decided_job
    from sku.plan.job import job_of

    job = job_of(settings, gpus=gpus, sharding=sharding, row_tokens=row_tokens, answer_tokens=answer_tokens)
    job = decided_job(job, settings, gpu_memory * GIB)
    made = estimated(job, gpu_memory=gpu_memory * GIB, tflops=peak_tflops, efficiency=efficiency)
    advice = suggestions(made)
    if as_json:
        advised = [dataclasses.asdict(suggestion) for suggestion in advice]
        print_json({**made.to_dict(), "suggestions": advised})
        return
    _show(made, advice)


def _show(made: Estimate, advice: list[Suggestion]) -> None:
    from sku.plan.estimate import CONTEXT_BYTES, FRAGMENTATION, GIB, STREAM_BYTES

    job, weights = made.job, made.weights
    results.print(
        f"{job.name}: {weights.parameters:,} parameters, {weights.trainable:,} trained ({job.tuning}, "
        f"{job.gpus} x {job.sharding if job.gpus > 1 else 'GPU'}), {job.rows} rows of {job.row_tokens} tokens at once"
        f", activation checkpointing {'on' if job.checkpointing else 'off'}"
    )
    if job.shipped_shape:
        results.print("its configuration is out of reach: its shape is as this package knows it")
    table = plain_table(("GiB on each GPU",), ("",))
    stage_1 = dataclasses.asdict(made.stage_1)
    logits = stage_1.pop("logits")
    for name, size in stage_1.items():
        table.add_row(f"  {name}", f"{size / GIB:.2f}")
        if name == "activations":
            table.add_row("    of these logits, once", f"{logits / GIB:.2f}")
    for name, size in (
        ("stage 1", made.stage_1.total),
        ("loading, before it is sharded", made.loading),
        ("stage 2 and evaluation, weights alone", made.stage_2),
        ("needed", made.needed),
    ):
        table.add_row(name, f"{size / GIB:.2f}")
    results.print(table)
    results.print(
        f"\nneeded is the largest of these with {FRAGMENTATION:.0%} for the allocator and "
        f"{CONTEXT_BYTES / GIB:.1f} GiB for CUDA (assumed)"
    )
    results.print(
        f"stage 2   {made.stage_2_host / GIB:.2f} GiB of the computer's memory in sku run, "
        f"{STREAM_BYTES / GIB:.2f} in sku negate"
    )
    results.print(f"disk      {made.disk / GIB:.2f} GiB")
    results.print(
        f"time      {made.step_seconds:.3g} s a step"
        + ("" if made.seconds is None else f", {made.seconds / 3600:.2g} h for {job.steps} steps")
        + f": {made.step_flops / 1e12:.3g} TFLOP at {made.efficiency:.0%} of {made.tflops:g} TFLOP/s (assumed)"
    )
    if made.fits:
        results.print(f"fits      {made.needed / GIB:.1f} of {made.gpu_memory / GIB:.1f} GiB")
        return
    results.print(
        f"too large by {(made.needed - made.gpu_memory) / GIB:.1f} GiB; what would help, the cheapest first:"
    )
    for suggestion in advice:
        verdict = "fits" if suggestion.fits else "not enough alone"
        results.print(f"  {suggestion.needed / GIB:7.1f} GiB  {verdict}: {suggestion.change}  ({suggestion.cost})")
