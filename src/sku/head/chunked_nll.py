"""Negative log-likelihood from hidden states, without a ``[N, V]`` tensor.

Shapes: N = positions, H = width of the hidden states, V = vocabulary, C = positions of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sku.head.gradients import ChunkLoss, ChunkPass
from sku.head.scores import Head, HeadScores


def chunked_nll(scores_NV: HeadScores, targets_N: Tensor) -> Tensor:
    """``-log p(y_t)`` of each target, with p the softmax of the scores over the whole vocabulary.

    ``nll_n = logsumexp_v s_nv - s_ny``; slope in the scores: ``softmax(s_n) - onehot(y_n)``.

    Args:
        scores_NV: Hidden states and head. Gradient flows into the hidden states, and into the head where it is
            trained (tied embeddings included: it is added to what they get elsewhere).
        targets_N: Token ids, 0 to V-1. No position is masked: the caller keeps those that count.

    Returns:
        ``[N]`` float32, nats, not reduced.

    Raises:
        ValueError: The shapes don't fit.

    Source: own. The idea of making a loss's gradient while its scores are there is that of arXiv 2410.10989 (Liger).
    """
    hidden_NH = scores_NV.hidden_NH
    if hidden_NH.dim() != 2 or targets_N.shape != hidden_NH.shape[:1]:
        raise ValueError(f"hidden states {tuple(hidden_NH.shape)} and targets {tuple(targets_N.shape)} don't fit")
    head = scores_NV.head
    losses_N = _ChunkedNll.apply(  # type: ignore[no-untyped-call]
        hidden_NH, head.weight_VH, head.bias_V, targets_N, head
    )
    assert isinstance(losses_N, Tensor)
    return losses_N


class _ChunkedNll(torch.autograd.Function):
    """Per-token loss; its gradient is made in the forward pass where the head is frozen."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, head: Head
    ) -> Tensor:
        normalisers_N1: list[Tensor] = []
        walk = ChunkPass(head, _nll_of(targets_N, normalisers_N1))
        ctx.trains_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        in_forward = ctx.needs_input_grad[0] and not ctx.trains_head
        with torch.autocast(hidden_NH.device.type, enabled=False):
            losses_N, gradient_NH = walk.forward(hidden_NH, weight_VH, bias_V, gradient=in_forward)
        ctx.head = head
        if ctx.trains_head:
            ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, _joined(normalisers_N1, losses_N))
        elif gradient_NH is not None:
            ctx.save_for_backward(gradient_NH)
        return losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.trains_head:
            (gradient_NH,) = ctx.saved_tensors
            return (gradient_NH * upstream_N[:, None]).to(gradient_NH.dtype), None, None, None, None
        *inputs, targets_N, normalisers_N1 = ctx.saved_tensors
        walk = ChunkPass(ctx.head, _nll_of(targets_N, normalisers_N1))
        with torch.autocast(upstream_N.device.type, enabled=False):
            gradients = walk.backward(upstream_N, *inputs, needed=ctx.needs_input_grad[:3])
        return (*gradients, None, None)


def _nll_of(targets_N: Tensor, normalisers_N1: Tensor | list[Tensor]) -> ChunkLoss:
    """The loss of a chunk.

    Args:
        targets_N: Token ids.
        normalisers_N1: ``logsumexp`` of each position's scores; a list takes what is computed.
    """

    def loss(part: slice, scores_CV: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        targets_C1 = targets_N[part, None]
        if isinstance(normalisers_N1, list):
            lse_C1 = scores_CV.logsumexp(-1, keepdim=True)
            normalisers_N1.append(lse_C1)
        else:
            lse_C1 = normalisers_N1[part]
        losses_C = (lse_C1 - scores_CV.gather(1, targets_C1))[:, 0]
        if not wanted:
            return losses_C, None
        slopes_CV = scores_CV.sub_(lse_C1).exp_()
        slopes_CV.scatter_add_(1, targets_C1, slopes_CV.new_full(targets_C1.shape, -1))
        return losses_C, slopes_CV

    return loss


def _joined(parts: list[Tensor], like_N: Tensor) -> Tensor:
    """``[N, 1]`` from those of the chunks, of which no position has none."""
    return torch.cat([like_N.new_empty(0, 1), *parts])
