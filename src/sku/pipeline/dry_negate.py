"""``sku negate --dry-run``: stage 2 with every check but those of weights, and no output."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from sku.config import ModelConfig
from sku.data.examples import ForgetRetainData
from sku.dry_run import DryRun
from sku.negate.files import model_folder
from sku.negate.operators import PreparedOperator
from sku.negate.operators.base import OperatorContext, context_of
from sku.negate.rounding import Rounding
from sku.negate.stream_plan import Plan, check_bad
from sku.negate.streaming import check_negation
from sku.pipeline.dry_checks import check_model
from sku.storage import check_can_be_made, check_new


def dry_negate(
    base: str,
    bad: Path,
    out: Path,
    alpha: float,
    *,
    output_dtype: torch.dtype | None = None,
    rounding: Rounding = "nearest",
    seed: int = 0,
    threads: int = 1,
    gguf_file: str | None = None,
    operators: Sequence[PreparedOperator] = (),
    texts: ForgetRetainData | None = None,
) -> DryRun:
    """What ``sku negate`` would do.

    Args:
        base: Folder or hub id of the original model, or ``embedded``; of the hub all but the weights is read.
        bad: Folder of the bad model, its adapter, or a task vector.
        out: New folder.
        alpha: How much would be subtracted.
        output_dtype: Of the result; that of each tensor if None.
        rounding: Of the result.
        seed: Of rounding and operators.
        threads: Of the streamed subtraction.
        gguf_file: Inside ``base``.
        operators: Applied first, in memory.
        texts: What they look at.

    Returns:
        Files and sizes.

    Raises:
        SkuError: As ``negate_folders`` and ``operate``, but for what only weights show; also where the disk is too
            small.
    """
    check_new(out)
    check_can_be_made(out)
    folder = None if gguf_file is not None else model_folder(base)
    settings: dict[str, object] = {"base": base, "bad model": str(bad), "alpha": alpha}
    has_safetensors = folder is not None and (folder / "config.json").is_file()
    size = 0
    if operators or not has_safetensors or os.name != "posix":
        model = check_model(ModelConfig(path=base, gguf_file=gguf_file, dtype="float32" if gguf_file else "stored"))
        context = OperatorContext(base=model.skeleton, seed=seed)
        if texts is not None:
            context = context_of(model.skeleton, model.tokenizer, texts, seed=seed)
        for chosen in operators:
            context.check(chosen.needs, chosen.who)
        check_bad(model_folder(str(bad)))
        size = model.parameters * (model.dtype if output_dtype is None else output_dtype).itemsize
        settings |= {"base": model.describe(), "arithmetic": "in memory"}
    streamed: Plan | None = None
    if folder is not None and has_safetensors:
        streamed = check_negation(folder, model_folder(str(bad)), out, alpha, output_dtype, rounding, threads)
        size = streamed.size
        settings["weights"] = f"{len(streamed.changed)} of {len(streamed.work)} change"
        settings["dtype"] = str(streamed.dtype).removeprefix("torch.")
    found = DryRun(
        command="sku negate",
        out=out,
        settings={**settings, "rounding": rounding},
        stages=(*(f"apply {chosen.operator.name}" for chosen in operators), "subtract the task vector"),
        writes=tuple(layout.name for layout in streamed.layouts) if streamed is not None else ("model.safetensors",),
        disk_bytes=size,
        bad_model="kept",
        examples={} if texts is None else {name: count for name, count in texts.counts().items() if count},
    )
    found.check_disk()
    return found
