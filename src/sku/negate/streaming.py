"""Stage 2 from file to file: ``theta_u = theta_o - alpha * (theta_bad - theta_o)`` without loading a model.

The memory that it takes depends on the number of threads and not on the model. The bits are those of
``sku.negate.negate``. The new folder has the base's shards, names and header metadata.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from sku.errors import RecipeError, TaskVectorError
from sku.negate import arithmetic
from sku.negate.arithmetic import MOST_THREADS, StreamedNegation, Sums, block_pool
from sku.negate.files import copy_companions, write_config, write_index
from sku.negate.rounding import Rounding
from sku.negate.stream_plan import Plan, identities, plan_negation
from sku.negate.stream_write import ShardWriter
from sku.storage import check_new, check_space, resumable_folder, write_json

Progress = Callable[[int, int], None]
"""Called with the bytes that are done and those there are."""
_FINISHED = "finished.json"


@dataclass(frozen=True, kw_only=True)
class NegatedFolder:
    """What a streamed subtraction left."""

    record: StreamedNegation
    left_out: tuple[str, ...]
    """Files and folders beside the base's weights that were not copied: its model card, other weights."""
    resumed_files: int
    """Weight files that an interrupted call had finished."""


def negate_folders(
    base: Path | str,
    bad: Path | str,
    out: Path | str,
    alpha: float = 1.0,
    *,
    output_dtype: torch.dtype | None = None,
    rounding: Rounding = "nearest",
    seed: int = 0,
    threads: int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> NegatedFolder:
    """Subtracts what stage 1 learned from the original weights, from folder to folder.

    Args:
        base: Folder of the original model, in safetensors. It is only read, and so is ``bad``.
        bad: Folder of the bad model, of its LoRA adapter, or a saved task vector.
        out: New folder for the unlearned model; loads with transformers.
        alpha: How much to subtract; the paper uses 1. 0 gives the original weights bit for bit.
        output_dtype: Type of the result; that of each stored tensor if None. The arithmetic is float32.
        rounding: How a result becomes bfloat16 or float16: to the nearest number, or by chance to one of the two
            neighbours, which on average loses nothing of the change.
        seed: Of the stochastic rounding. Equal seeds give equal bits, with any number of threads.
        threads: How many read, compute and write; at most 4 by default, which suffice for a fast disk.
        resume: Go on with the files that a killed call with the same inputs had finished.
        progress: Called after each block.

    Returns:
        The record, and what was not copied.

    Raises:
        RecipeError: ``alpha``, ``rounding`` or ``threads`` is not usable.
        ModelError: A file is damaged, quantized or no model's.
        TaskVectorError: The two don't fit, or a result is not finite.
        OutputError: ``out`` exists or can't be written, or what is to be resumed had other inputs.
    """
    base, bad, out = Path(base), Path(bad), Path(out)
    plan = check_negation(base, bad, out, alpha, output_dtype, rounding, 1 if threads is None else threads)
    return negate_planned(
        plan,
        base,
        bad,
        out,
        alpha,
        output_dtype=output_dtype,
        rounding=rounding,
        seed=seed,
        threads=threads,
        resume=resume,
        progress=progress,
    )


def negate_planned(
    plan: Plan,
    base: Path,
    bad: Path,
    out: Path,
    alpha: float,
    *,
    output_dtype: torch.dtype | None,
    rounding: Rounding,
    seed: int,
    threads: int | None,
    resume: bool,
    progress: Progress | None,
) -> NegatedFolder:
    """``negate_folders`` by the plan that ``check_negation`` made of the same arguments: no header is read again.

    Raises:
        SkuError: As ``negate_folders``; an input that has changed since the plan was made is refused.
    """
    threads = min(MOST_THREADS, os.cpu_count() or 1) if threads is None else threads
    inputs = identities(base, bad, plan) | {
        "alpha": alpha, "dtype": str(output_dtype), "rounding": rounding, "seed": seed,
        "block": arithmetic.BLOCK_ELEMENTS,
    }  # fmt: skip
    if not resume:
        check_space(out, plan.size, f"the unlearned model in {out}")
    with resumable_folder(out, inputs, resume=resume) as folder:
        # A call that was killed at its very end left it; no folder may load while files are copied into it anew.
        (folder / "config.json").unlink(missing_ok=True)
        done = _Finished(folder, plan)
        resumed = len(done.sums)
        with ShardWriter(plan, alpha, rounding, seed) as writer:
            _write_shards(writer, plan, done, threads, progress)
        total = Sums.total([done.sums[layout.name] for layout in plan.layouts])
        if total.difference == 0 and plan.empty_message is not None:
            raise TaskVectorError(plan.empty_message)
        for file in plan.inputs:
            file.check_unchanged()
        left_out = copy_companions(base, folder, [layout.name for layout in plan.layouts])
        write_index(base, folder, sum(layout.size - len(layout.header) for layout in plan.layouts))
        write_config(base, folder, output_dtype)
    changed = sum(work.counts for work in plan.changed)
    record = StreamedNegation.of(total, alpha, changed, plan.dtype, rounding=rounding, rounding_seed=seed)
    return NegatedFolder(record=record, left_out=left_out, resumed_files=resumed)


def check_negation(
    base: Path, bad: Path, out: Path, alpha: float, output_dtype: torch.dtype | None, rounding: str, threads: int
) -> Plan:
    """All that ``negate_folders`` checks before it reads weights, with its arguments; nothing is written.

    Raises:
        SkuError: As ``negate_folders``, but for what only weights show: results that are not finite, no difference.
    """
    if not math.isfinite(alpha):
        raise RecipeError(f"alpha is {alpha}; it must be a finite number")
    if rounding not in get_args(Rounding):
        raise RecipeError(f"rounding is {rounding}; it must be one of {', '.join(get_args(Rounding))}")
    if threads < 1:
        raise RecipeError(f"threads is {threads}; it must be at least 1")
    check_new(out)
    return plan_negation(base, bad, output_dtype)


class _Finished:
    """The weight files that are whole, with their sums: what an interrupted call is gone on from."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder = folder
        self._path = folder.parent / _FINISHED
        self.sums: dict[str, Sums] = {}
        if self._path.is_file():
            found = json.loads(self._path.read_text(encoding="utf-8"))
            # After a kill after the last rename the list is left and the files are gone.
            there = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
            whole = {layout.name for layout in plan.layouts if there.get(layout.name) == layout.size}
            self.sums = {name: Sums(**sums) for name, sums in found.items() if name in whole}

    def add(self, name: str, sums: Sums) -> None:
        self.sums[name] = sums
        write_json(self._path, {name: dataclasses.asdict(sums) for name, sums in self.sums.items()})


def _write_shards(writer: ShardWriter, plan: Plan, done: _Finished, threads: int, progress: Progress | None) -> None:
    written = sum(layout.size for layout in plan.layouts if layout.name in done.sums)

    def advance(count: int) -> None:
        nonlocal written
        written += count
        if progress is not None:
            progress(written, plan.size)

    advance(0)
    with block_pool(threads) as pool:
        for layout in plan.layouts:
            if layout.name not in done.sums:
                done.add(layout.name, writer.write(layout, done.folder, pool, advance))
