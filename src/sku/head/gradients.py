"""How the gradient of a chunked loss is made: in the forward pass where the head is frozen, else by a second look.

Both losses are sums over positions whose slope in the scores is known in closed form once the scores are there. With a
frozen head each position's gradient is a multiple of one vector that the forward pass can make, whatever the objective
does with the position's loss later: 2 matrix products a loss, against 3 with a second look. A head that is trained
needs the outer product of slope and hidden state weighted by what comes later, so its scores are made again: 4 against
the 3 of a loss that holds them all.

Shapes: N = positions, H = width of the hidden states, V = vocabulary, C = positions of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sku.head.scores import Head, add_outer, chunk_scores, chunks, product_slope

ChunkLoss = Callable[[slice, Tensor, bool], tuple[Tensor, Tensor | None]]
"""Positions of a chunk, their scores ``[C, V]`` (free to be overwritten), whether the slope is wanted -> the loss of
each, ``[C]``, and its slope in each score, ``[C, V]``."""


@dataclass(frozen=True)
class ChunkPass:
    """One walk over all positions of a loss, chunk by chunk."""

    head: Head
    loss: ChunkLoss

    def forward(
        self, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, *, gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Losses and, where asked for, the gradient of each in its own hidden state.

        Returns:
            ``[N]`` in float32 (float64 from float64), and ``[N, H]`` in the type of ``hidden_NH``, or None.
        """
        hidden, weight, bias = self._as_product(hidden_NH, weight_VH, bias_V)
        losses_N = hidden_NH.new_empty(len(hidden_NH), dtype=_wide(hidden.dtype))
        gradient_NH = torch.empty_like(hidden_NH) if gradient else None
        for part in chunks(len(hidden), self.head.rows_of_a_chunk):
            losses_N[part], slopes_CV = self._slopes(part, hidden, weight, bias, wanted=gradient)
            if gradient_NH is not None:
                assert slopes_CV is not None
                gradient_NH[part] = slopes_CV.to(weight.dtype) @ weight
        return losses_N, gradient_NH

    def backward(
        self, upstream_N: Tensor, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, *, needed: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden states, weight and bias, with the scores made again.

        Args:
            upstream_N: Derivative of the objective in the loss of each position.
            hidden_NH: As in ``forward``.
            weight_VH: As in ``forward``.
            bias_V: As in ``forward``.
            needed: Three flags, which of them are wanted.
        """
        hidden, weight, bias = self._as_product(hidden_NH, weight_VH, bias_V)
        wide = _wide(hidden.dtype)
        gradient_NH = torch.empty_like(hidden_NH) if needed[0] else None
        weight_gradient_VH = torch.zeros_like(weight_VH, dtype=wide) if needed[1] else None
        bias_gradient_V = torch.zeros(len(weight_VH), dtype=wide, device=hidden.device) if needed[2] else None
        for part in chunks(len(hidden), self.head.rows_of_a_chunk):
            _, slopes_CV = self._slopes(part, hidden, weight, bias, wanted=True)
            assert slopes_CV is not None
            slopes_CV.mul_(upstream_N[part, None])
            if bias_gradient_V is not None:
                bias_gradient_V += slopes_CV.sum(0)
            slopes_CV = slopes_CV.to(weight.dtype)
            if gradient_NH is not None:
                gradient_NH[part] = slopes_CV @ weight
            if weight_gradient_VH is not None:
                add_outer(weight_gradient_VH, slopes_CV, hidden[part])
        return (
            gradient_NH,
            None if weight_gradient_VH is None else weight_gradient_VH.to(weight_VH.dtype),
            None if bias_gradient_V is None or bias_V is None else bias_gradient_V.to(bias_V.dtype),
        )

    def _slopes(
        self, part: slice, hidden: Tensor, weight: Tensor, bias: Tensor | None, *, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Losses of a chunk and their slopes in ``W h + b``."""
        scores_CV = chunk_scores(hidden[part], weight, bias, self.head)
        own_slope = product_slope(scores_CV, self.head) if wanted else 1.0  # Before the scores are overwritten.
        losses_C, slopes_CV = self.loss(part, scores_CV, wanted)
        if slopes_CV is not None and not (isinstance(own_slope, float) and own_slope == 1):
            slopes_CV.mul_(own_slope)
        return losses_C, slopes_CV

    def _as_product(
        self, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        dtype = self.head.product_dtype
        return hidden_NH.to(dtype), weight_VH.to(dtype), None if bias_V is None else bias_V.to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
