"""The step of stage 1 as the paper describes it, written plainly: what ``stage1.py`` races.

Three padded batches, three forward passes with scores at every position, and a second model for the divergence.
Losses are those of arXiv 2402.10058: means over answer tokens, then over answers, then over examples; the KL over the
answer's positions of the normal pair, negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from sku.data.batches import JointExample
from sku.data.examples import RowType
from sku.data.tokens import IGNORE_INDEX, TokenizedExample


@dataclass(frozen=True, kw_only=True)
class Padded:
    """The rows of one module, ``[R, T]`` each."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @classmethod
    def of(cls, rows: Sequence[TokenizedExample], pad: int, device: torch.device) -> Padded:
        """Pads rows on the right to the longest."""
        ids = [torch.tensor(row.input_ids) for row in rows]

        def padded(tensors: Sequence[Tensor], value: int) -> Tensor:
            return pad_sequence(list(tensors), batch_first=True, padding_value=value).to(device)

        return cls(
            input_ids=padded(ids, pad),
            attention_mask=padded([torch.ones_like(row) for row in ids], 0),
            labels=padded([torch.tensor(row.labels) for row in rows], IGNORE_INDEX),
        )


@dataclass(frozen=True, kw_only=True)
class NaiveBatch:
    """Guided distortion, random disassociation (K rows an example, in order) and normal rows."""

    parts: tuple[Padded, Padded, Padded]

    @classmethod
    def of(cls, examples: Sequence[JointExample], pad: int, device: torch.device) -> NaiveBatch:
        """Three padded batches of the same joint examples."""
        first, second, third = (
            Padded.of([row for example in examples for row in example.of(kind)], pad, device)
            for kind in (RowType.FORGET, RowType.MISMATCHED, RowType.RETAIN)
        )
        return cls(parts=(first, second, third))


def naive_loss(model: Any, teacher: Any, batch: NaiveBatch, weights: Sequence[float]) -> Tensor:
    """Weighted sum of the three modules, nats per token.

    Args:
        model: In training.
        teacher: The original.
        batch: On the models' device.
        weights: Of guided distortion, random disassociation and preservation divergence.

    Returns:
        Scalar.
    """
    guided, mismatched, normal = batch.parts
    distortion = _row_means(_nll(_logits(model, guided), guided), guided).mean()
    # Every example has K rows, so the mean over rows is that over examples of the mean over K.
    disassociation = _row_means(_nll(_logits(model, mismatched), mismatched), mismatched).mean()
    with torch.no_grad():
        log_p = _logits(teacher, normal).float().log_softmax(-1)
    log_q = _logits(model, normal).float().log_softmax(-1)
    divergence = _row_means((log_p.exp() * (log_p - log_q)).sum(-1)[:, :-1], normal).mean()
    return weights[0] * distortion + weights[1] * disassociation - weights[2] * divergence


def _logits(model: Any, rows: Padded) -> Tensor:
    logits: Tensor = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False).logits
    return logits


def _nll(logits: Tensor, rows: Padded) -> Tensor:
    """``[R, T - 1]``, 0 where there is no target."""
    targets = rows.labels[:, 1:]
    flat = functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORE_INDEX
    )
    return flat.view(targets.shape)


def _row_means(values: Tensor, rows: Padded) -> Tensor:
    counts = rows.labels[:, 1:] != IGNORE_INDEX
    return (values * counts).sum(1) / counts.sum(1)
