"""Scores that are not made yet: hidden states, and the head that would turn them into one number a vocabulary entry.

Shapes: N = positions, H = width of the hidden states, V = vocabulary, C = positions of one chunk.
"""

from __future__ import annotations

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
    """Type of the matrix product, as autocast sets it; that of the weight if None. Scores are float32 after it."""
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
    """What goes into the head: after the final norm, and a last projection where the model has one."""
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
