"""Divergence of two models from their hidden states, without a ``[N, V]`` tensor.

Shapes: N = positions, H = width of the hidden states, V = vocabulary, C = positions of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sku.head.gradients import ChunkLoss, ChunkPass
from sku.head.scores import Head, HeadScores, chunk_scores


def chunked_kl(reference_NV: HeadScores, scores_NV: HeadScores) -> Tensor:
    """``KL(P || Q) = sum_v P(v) (log P(v) - log Q(v))`` at each position, from log-softmax on both sides.

    Slope in Q's scores: ``Q - P``.

    Args:
        reference_NV: P, the frozen original model: its hidden states and its head. No gradient flows into either.
        scores_NV: Q, the model in training. Gradient as in ``chunked_nll``. Its chunks hold for both.

    Returns:
        ``[N]`` float32, nats, zero or more up to rounding, not reduced.

    Raises:
        ValueError: The two differ in positions or vocabulary.
    """
    if scores_NV.hidden_NH.dim() != 2 or reference_NV.shape != scores_NV.shape:
        raise ValueError(
            f"reference scores {tuple(reference_NV.shape)} and scores {tuple(scores_NV.shape)} differ in shape"
        )
    head, reference = scores_NV.head, reference_NV.head
    losses_N = _ChunkedKl.apply(  # type: ignore[no-untyped-call]
        scores_NV.hidden_NH, head.weight_VH, head.bias_V, head,
        reference_NV.hidden_NH.detach(), reference.weight_VH.detach(),
        None if reference.bias_V is None else reference.bias_V.detach(), reference,
    )  # fmt: skip
    assert isinstance(losses_N, Tensor)
    return losses_N


class _ChunkedKl(torch.autograd.Function):
    """Per-token loss; its gradient is made in the forward pass where the head is frozen."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, head: Head,
        reference_NH: Tensor, reference_weight_VH: Tensor, reference_bias_V: Tensor | None, reference_head: Head,
    ) -> Tensor:  # fmt: skip
        ctx.heads = head, reference_head
        ctx.trains_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        in_forward = ctx.needs_input_grad[0] and not ctx.trains_head
        reference = reference_NH, reference_weight_VH, reference_bias_V
        with torch.autocast(hidden_NH.device.type, enabled=False):
            walk = ChunkPass(head, _kl_from(*reference, reference_head))
            losses_N, gradient_NH = walk.forward(hidden_NH, weight_VH, bias_V, gradient=in_forward)
        if ctx.trains_head:
            ctx.save_for_backward(hidden_NH, weight_VH, bias_V, *reference)
        elif gradient_NH is not None:
            ctx.save_for_backward(gradient_NH)
        return losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 5
        if not ctx.trains_head:
            (gradient_NH,) = ctx.saved_tensors
            return (gradient_NH * upstream_N[:, None]).to(gradient_NH.dtype), None, None, *nothing
        hidden_NH, weight_VH, bias_V, reference_NH, reference_weight_VH, reference_bias_V = ctx.saved_tensors
        head, reference_head = ctx.heads
        with torch.autocast(upstream_N.device.type, enabled=False):
            loss = _kl_from(reference_NH, reference_weight_VH, reference_bias_V, reference_head)
            walk = ChunkPass(head, loss)
            gradients = walk.backward(upstream_N, hidden_NH, weight_VH, bias_V, needed=ctx.needs_input_grad[:3])
        return (*gradients, *nothing)


def _kl_from(reference_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, head: Head) -> ChunkLoss:
    dtype = head.product_dtype
    hidden, weight = reference_NH.to(dtype), weight_VH.to(dtype)
    bias = None if bias_V is None else bias_V.to(dtype)

    def loss(part: slice, scores_CV: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        log_p_CV = chunk_scores(hidden[part], weight, bias, head)
        log_p_CV.sub_(log_p_CV.logsumexp(-1, keepdim=True))
        log_q_CV = scores_CV.sub_(scores_CV.logsumexp(-1, keepdim=True))
        p_CV = log_p_CV.exp()
        losses_C = (log_p_CV.sub_(log_q_CV)).mul_(p_CV).sum(-1)
        return losses_C, log_q_CV.exp_().sub_(p_CV) if wanted else None

    return loss
