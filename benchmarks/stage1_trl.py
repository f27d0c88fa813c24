"""TRL's packed supervised fine-tuning on the harmful rows of stage 1, for ``stage1.py --trl``.

The same B(K+1) prompt and answer pairs as completion-only rows, best-fit packed into one row, cross-entropy alone;
ours is the tree without preservation divergence. Forward pass and backward, no optimizer. TRL keeps the rows of a
packed row apart only with flash attention, so without that package it is given them unpacked, and the line says so.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from sku.config import ModulesConfig, WeightsConfig
from sku.data.batches import ROWS, JointCollator, JointExample, SourceRow
from sku.data.examples import RowType
from sku.data.tokens import IGNORE_INDEX
from sku.methods.sku import sku_objective
from sku.methods.trainer import SkuTrainer
from sku.models import LoadedModel, plain_model


def race(trainer: SkuTrainer, loaded: LoadedModel, batches: Sequence[Sequence[JointExample]], *, steps: int) -> str:
    """Times both on the first batch: ours first, since TRL puts a forward pass of its own into the model.

    Args:
        trainer: Of stage 1; its model is trained by both.
        loaded: The model.
        batches: The first one is used.
        steps: Timed steps of each.

    Returns:
        Words for a line of the output.
    """
    import trl

    device, model = loaded.model.device, trainer.model
    assert isinstance(model, nn.Module)
    rows = [
        SourceRow(kind=kind, example=place, tokens=row)
        for place, example in enumerate(batches[0])
        for kind, row in example.rows()
        if kind != RowType.RETAIN
    ]
    packed = JointCollator("tree").lay_out(rows, len(batches[0])).to(device)
    inputs = {ROWS: packed, "forget_index": torch.zeros(len(batches[0])), "input_ids": packed.input_ids}

    def step_of_ours() -> Tensor:
        with _without_preservation(trainer):
            loss: Tensor = trainer.compute_loss(model, inputs)
        return loss

    narrow = loaded.model.dtype == torch.bfloat16
    seconds = {"ours": _timed(step_of_ours, model, device, narrow=narrow, steps=steps)}
    flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    plain_model(model).set_attn_implementation("flash_attention_2" if flash else "sdpa")  # type: ignore[arg-type]
    sft = _sft(trl, model, loaded, rows, packed=flash)
    batch = sft._prepare_inputs(next(iter(sft.get_train_dataloader())))

    def step_of_theirs() -> Tensor:
        loss: Tensor = sft.compute_loss(model, dict(batch))
        return loss

    seconds["theirs"] = _timed(step_of_theirs, model, device, narrow=narrow, steps=steps)
    theirs, ours = (len(rows) / seconds[name] for name in ("theirs", "ours"))
    how = "packed, flash attention" if flash else "not packed: no flash_attn here"
    return (
        f"{trl.__version__} SFT ({how}) {theirs:.1f} rows/s, tree {ours:.1f} rows/s, cross-entropy alone: "
        f"ratio {ours / theirs:.2f} x"
    )


def _sft(trl: Any, model: nn.Module, loaded: LoadedModel, rows: Sequence[SourceRow], *, packed: bool) -> Any:
    examples = {
        "input_ids": [list(row.tokens.input_ids) for row in rows],
        "completion_mask": [[int(label != IGNORE_INDEX) for label in row.tokens.labels] for row in rows],
    }
    config = trl.SFTConfig(
        output_dir=tempfile.mkdtemp(prefix="sku-stage1-trl-"), max_steps=1, report_to="none", packing=packed,
        packing_strategy="bfd", max_length=sum(map(len, examples["input_ids"])) if packed else None,
        per_device_train_batch_size=1 if packed else len(rows), completion_only_loss=True,
        activation_checkpointing=False, bf16=loaded.model.dtype == torch.bfloat16,
        use_cpu=loaded.model.device.type == "cpu", disable_tqdm=True,
    )  # fmt: skip
    return trl.SFTTrainer(
        model=model, args=config, train_dataset=Dataset.from_dict(examples), processing_class=loaded.tokenizer
    )


@contextmanager
def _without_preservation(trainer: SkuTrainer) -> Iterator[None]:
    """The objective of stage 1 with its third weight at 0."""
    objective = trainer.objective
    weights = WeightsConfig(preservation_divergence=0.0)
    trainer.objective = sku_objective(ModulesConfig(weights=weights))
    try:
        yield
    finally:
        trainer.objective = objective


def _timed(step: Callable[[], Tensor], model: nn.Module, device: torch.device, *, narrow: bool, steps: int) -> float:
    """Median seconds of a step; the first one, which sets up what later ones find, is left out."""
    seconds = []
    for _ in range(steps + 1):
        model.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=narrow):
            loss = step()
        loss.backward()  # type: ignore[no-untyped-call]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
