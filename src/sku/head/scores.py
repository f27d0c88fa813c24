"""Scores that are not made yet: hidden states, and the head that would turn them into one number a vocabulary entry.

Shapes: N = positions, H = width of the hidden states, V = vocabulary, C = positions of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

CHUNK_BYTES = 128 * 2**20
"""Float32 scores of one chunk. Of that size there are up to six tensors at once, whatever N is."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """``score = f(scale * (W h + b))`` with ``f(z) = softcap * tanh(z / softcap)``, or ``f(z) = z`` without one."""

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    """Such as ``logit_scale`` of Cohere, or 1 / ``logits_scaling`` of Granite."""
    softcap: float | None = None
    """``final_logit_softcapping`` of Gemma 2."""
    dtype: torch.dtype | None = None
    """Type of the matrix product, as autocast sets it; that of the weight if None. Scores are float32 behind it."""
    chunk_rows: int | None = None
    """C; as many as ``CHUNK_BYTES`` hold if None."""

    @property
    def rows_of_a_chunk(self) -> int:
        """C, 1 or more."""
        return self.chunk_rows or max(1, CHUNK_BYTES // (4 * self.weight_VH.shape[0]))

    @property
    def product_dtype(self) -> torch.dtype:
        """Type of the matrix product."""
        return self.dtype or self.weight_VH.dtype


@dataclass(frozen=True, kw_only=True)
class HeadScores:
    """What ``answer_nll`` and ``token_kl`` take in place of ``[N, V]`` scores that would not fit."""

    hidden_NH: Tensor
    """What goes into the head: behind the final norm, and a last projection where the model has one."""
    head: Head

    @property
    def shape(self) -> torch.Size:
        """``[N, V]``, that of the scores."""
        return torch.Size((*self.hidden_NH.shape[:-1], self.head.weight_VH.shape[0]))

    def __getitem__(self, places: Tensor | int) -> HeadScores:
        """Those of some positions, by mask or index, as of the scores themselves."""
        return replace(self, hidden_NH=self.hidden_NH[places])

    def logits(self) -> Tensor:
        """``[N, V]`` scores in the type of the product, with gradient: for losses that need them all at once."""
        head, dtype = self.head, self.head.product_dtype
        bias_V = None if head.bias_V is None else head.bias_V.to(dtype)
        with torch.autocast(self.hidden_NH.device.type, enabled=False):
            logits_NV = functional.linear(self.hidden_NH.to(dtype), head.weight_VH.to(dtype), bias_V)
        if head.scale != 1:
            logits_NV = logits_NV * head.scale
        return logits_NV if head.softcap is None else torch.tanh(logits_NV / head.softcap) * head.softcap


Scores = Tensor | HeadScores
"""``[N, V]``, made or not."""


def logits_of(scores_NV: Scores) -> Tensor:
    """``[N, V]`` scores as a tensor, made where they are not yet."""
    return scores_NV.logits() if isinstance(scores_NV, HeadScores) else scores_NV


def chunks(rows: int, rows_of_a_chunk: int) -> Iterator[slice]:
    """Slices that cover ``rows`` positions."""
    return (slice(start, start + rows_of_a_chunk) for start in range(0, rows, rows_of_a_chunk))


def chunk_scores(hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, head: Head) -> Tensor:
    """``[C, V]`` scores of one chunk in float32 (float64 from float64), without gradient.

    Args:
        hidden_CH: In the type of the product, as the next two.
        weight_VH: The head's.
        bias_V: The head's.
        head: For scale and softcap.
    """
    scores_CV = functional.linear(hidden_CH, weight_VH, bias_V)
    if scores_CV.dtype != torch.float64:
        scores_CV = scores_CV.float()
    if head.scale != 1:
        scores_CV.mul_(head.scale)
    return scores_CV if head.softcap is None else scores_CV.div_(head.softcap).tanh_().mul_(head.softcap)


def product_slope(scores_CV: Tensor, head: Head) -> Tensor | float:
    """Derivative of each score in its product ``W h + b``: ``scale * (1 - (score / softcap)^2)``."""
    if head.softcap is None:
        return head.scale
    return (scores_CV / head.softcap).square_().neg_().add_(1).mul_(head.scale)


def add_outer(total_VH: Tensor, slope_CV: Tensor, hidden_CH: Tensor) -> None:
    """``total += slope^T hidden``: one chunk's part of the gradient of the head's weight.

    Products of a narrower type than the total's are added up in slices of the vocabulary, so that no second ``[V, H]``
    is needed; the total itself is wide, since sums of many bfloat16 chunks would lose the later ones.
    """
    if total_VH.dtype == slope_CV.dtype:
        total_VH.addmm_(slope_CV.T, hidden_CH)
        return
    for part in chunks(len(total_VH), max(1, CHUNK_BYTES // (4 * total_VH.shape[1]))):
        total_VH[part] += slope_CV[:, part].T @ hidden_CH
