"""What the modules of stage 1 and the baselines share: tensors in, tensors out.

Padding never reaches these functions: the caller keeps the positions that count and drops the rest.

Scores may be a tensor, or ``HeadScores``, which are not made yet: hidden states, and the head that would turn them
into one number a vocabulary entry. NLL and KL come from them chunk by chunk, without ever holding all scores.

Both losses are sums over positions whose slope in the scores is known in closed form once the scores are there. With a
frozen head each position's gradient is a multiple of one vector that the forward pass can make, whatever the objective
does with the position's loss later: 2 matrix products a loss, against 3 with a second look. A head that is trained
needs the outer product of slope and hidden state weighted by what comes later, so its scores are made again: 4 against
the 3 of a loss that holds them all.

Shapes: N = kept positions of all rows (those whose next token counts), E = examples, V = vocabulary, H = width of the
hidden states, C = positions of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
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

    def __getitem__(self, places: int) -> HeadScores:
        """Those of one row of a batch, as of the scores themselves."""
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


def answer_nll(scores_NV: Scores, targets_N: Tensor) -> Tensor:
    """Negative log-likelihood of each target token, ``-log p(y_t | x, y_<t)``.

    Args:
        scores_NV: Scores at the position before each target, any floating type; or hidden states with their head, from
            which the same is computed chunk by chunk (``chunked_nll``).
        targets_N: Token ids.

    Returns:
        ``[N]`` float32, nats.

    Raises:
        ValueError: The shapes don't fit.
    """
    if len(scores_NV.shape) != 2 or targets_N.shape != scores_NV.shape[:1]:
        raise ValueError(f"scores {tuple(scores_NV.shape)} and targets {tuple(targets_N.shape)} don't fit")
    if isinstance(scores_NV, HeadScores):
        return chunked_nll(scores_NV, targets_N)
    return functional.cross_entropy(scores_NV.float(), targets_N, reduction="none")


def token_kl(reference_NV: Scores, scores_NV: Scores) -> Tensor:
    """``KL(P || Q) = sum_v P(v) (log P(v) - log Q(v))`` at each position, in float32 from log-softmax.

    Computed from log-probabilities on both sides, so an underflowing softmax can't make it infinite while the logits
    are finite.

    Args:
        reference_NV: P, the frozen original model. No gradient flows into it.
        scores_NV: Q, the model in training. Where both are hidden states with their heads, the same is computed chunk
            by chunk (``chunked_kl``).

    Returns:
        ``[N]`` float32, nats, zero or more up to rounding.

    Raises:
        ValueError: The shapes differ.
    """
    if len(scores_NV.shape) != 2 or reference_NV.shape != scores_NV.shape:
        raise ValueError(
            f"reference scores {tuple(reference_NV.shape)} and scores {tuple(scores_NV.shape)} differ in shape"
        )
    if isinstance(reference_NV, HeadScores) and isinstance(scores_NV, HeadScores):
        return chunked_kl(reference_NV, scores_NV)
    log_p = functional.log_softmax(logits_of(reference_NV).detach().float(), dim=-1)
    log_q = functional.log_softmax(logits_of(scores_NV).float(), dim=-1)
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def mean_per_example(values_N: Tensor, example_N: Tensor, num_examples: int) -> Tensor:
    """Mean of the values of each example, so that long and short answers weigh the same.

    Args:
        values_N: One value a position.
        example_N: Which example each position belongs to, 0 to ``num_examples - 1``.
        num_examples: E; each example must own at least one position.

    Returns:
        ``[E]``, in the units of ``values_N``.

    Raises:
        ValueError: The shapes differ.
    """
    totals = sum_per_example(values_N, example_N, num_examples)
    # Not bincount, for which a GPU has to be waited for.
    return totals / sum_per_example(torch.ones_like(values_N), example_N, num_examples)


def sum_per_example(values_N: Tensor, example_N: Tensor, num_examples: int) -> Tensor:
    """Sum of the values of each example: the log-likelihood of a whole answer from that of its tokens.

    Args:
        values_N: One value a position.
        example_N: Which example each position belongs to, 0 to ``num_examples - 1``.
        num_examples: E.

    Returns:
        ``[E]``, in the units of ``values_N`` times positions.

    Raises:
        ValueError: The shapes differ.
    """
    if values_N.shape != example_N.shape:
        raise ValueError(f"values {tuple(values_N.shape)} and examples {tuple(example_N.shape)} differ in shape")
    return values_N.new_zeros(num_examples).index_add(0, example_N, values_N)


ChunkLoss = Callable[[slice, Tensor, bool], tuple[Tensor, Tensor | None]]
"""Positions of a chunk, their scores ``[C, V]`` (free to be overwritten), whether the slope is wanted -> the loss of
each, ``[C]``, and its slope in each score, ``[C, V]``."""


def chunked_nll(scores_NV: HeadScores, targets_N: Tensor) -> Tensor:
    """``-log p(y_t)`` of each target, with p the softmax of the scores over the whole vocabulary.

    ``nll_n = logsumexp_v s_nv - s_ny``; slope in the scores: ``softmax(s_n) - onehot(y_n)``.

    Args:
        scores_NV: Hidden states and head. Gradient flows into the hidden states, and into the head where it is
            trained (tied embeddings included: it is added to what they get elsewhere).
        targets_N: Token ids, 0 to V-1. No position is masked: the caller keeps those that count.

    Returns:
        ``[N]`` float32, nats, not reduced.

    Source: own. The idea of making a loss's gradient while its scores are there is that of arXiv 2410.10989 (Liger).
    """
    return _apply(scores_NV, _nll, targets_N)


def chunked_kl(reference_NV: HeadScores, scores_NV: HeadScores) -> Tensor:
    """``KL(P || Q) = sum_v P(v) (log P(v) - log Q(v))`` at each position, from log-softmax on both sides.

    Slope in Q's scores: ``Q - P``.

    Args:
        reference_NV: P, the frozen original model: its hidden states and its head. No gradient flows into either.
        scores_NV: Q, the model in training. Gradient as in ``chunked_nll``. Its chunks hold for both.

    Returns:
        ``[N]`` float32, nats, zero or more up to rounding, not reduced.
    """
    reference = reference_NV.head
    bias_V = None if reference.bias_V is None else reference.bias_V.detach()
    frozen = (reference_NV.hidden_NH.detach(), reference.weight_VH.detach(), bias_V)
    # In the type of the product in training, so that equal models have a divergence of 0.
    dtype = scores_NV.head.product_dtype
    return _apply(scores_NV, lambda hidden, weight, bias: _kl(hidden, weight, bias, reference, dtype), *frozen)


def _nll(targets_N: Tensor) -> ChunkLoss:
    def loss(part: slice, scores_CV: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        targets_C1 = targets_N[part, None]
        lse_C1 = scores_CV.logsumexp(-1, keepdim=True)
        losses_C = (lse_C1 - scores_CV.gather(1, targets_C1))[:, 0]
        if not wanted:
            return losses_C, None
        slopes_CV = scores_CV.sub_(lse_C1).exp_()
        slopes_CV.scatter_add_(1, targets_C1, slopes_CV.new_full(targets_C1.shape, -1))
        return losses_C, slopes_CV

    return loss


def _kl(reference_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, head: Head, dtype: torch.dtype) -> ChunkLoss:
    hidden, weight = reference_NH.to(dtype), weight_VH.to(dtype)
    bias = None if bias_V is None else bias_V.to(dtype)

    def loss(part: slice, scores_CV: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        log_p_CV = _chunk_scores(hidden[part], weight, bias, head)
        log_p_CV.sub_(log_p_CV.logsumexp(-1, keepdim=True))
        log_q_CV = scores_CV.sub_(scores_CV.logsumexp(-1, keepdim=True))
        p_CV = log_p_CV.exp()
        losses_C = (log_p_CV.sub_(log_q_CV)).mul_(p_CV).sum(-1)
        return losses_C, log_q_CV.exp_().sub_(p_CV) if wanted else None

    return loss


def _apply(scores_NV: HeadScores, make_loss: Callable[..., ChunkLoss], *constants: Tensor | None) -> Tensor:
    """Losses of each position; ``make_loss`` makes that of a chunk from the constants."""
    head = scores_NV.head
    losses_N = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        scores_NV.hidden_NH, head.weight_VH, head.bias_V, head, make_loss, *constants
    )
    assert isinstance(losses_N, Tensor)
    return losses_N


class _ChunkedLoss(torch.autograd.Function):
    """Per-token loss; its gradient is made in the forward pass where the head is frozen."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, head: Head,
        make_loss: Callable[..., ChunkLoss], *constants: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.head, ctx.make_loss, ctx.num_constants = head, make_loss, len(constants)
        ctx.trains_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        wanted = ctx.needs_input_grad[0] and not ctx.trains_head
        gradient_NH = torch.empty_like(hidden_NH) if wanted else None
        with torch.autocast(hidden_NH.device.type, enabled=False):
            hidden, weight, bias = _as_product(head, hidden_NH, weight_VH, bias_V)
            losses_N = hidden_NH.new_empty(len(hidden_NH), dtype=_wide(hidden.dtype))
            loss = make_loss(*constants)
            for part in _chunks(len(hidden), head.rows_of_a_chunk):
                losses_N[part], slopes_CV = _slopes(loss, part, hidden, weight, bias, head, wanted=wanted)
                if gradient_NH is not None:
                    assert slopes_CV is not None
                    gradient_NH[part] = slopes_CV.to(weight.dtype) @ weight
        if ctx.trains_head:
            ctx.save_for_backward(hidden_NH, weight_VH, bias_V, *constants)
        elif gradient_NH is not None:
            ctx.save_for_backward(gradient_NH)
        return losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (2 + ctx.num_constants)
        if not ctx.trains_head:
            (gradient_NH,) = ctx.saved_tensors
            return (gradient_NH * upstream_N[:, None]).to(gradient_NH.dtype), None, None, *nothing
        hidden_NH, weight_VH, bias_V, *constants = ctx.saved_tensors
        with torch.autocast(upstream_N.device.type, enabled=False):
            loss = ctx.make_loss(*constants)
            gradients = _gradients(loss, upstream_N, hidden_NH, weight_VH, bias_V, ctx.head, ctx.needs_input_grad)
        return (*gradients, *nothing)


def _gradients(
    loss: ChunkLoss, upstream_N: Tensor, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, head: Head,
    needed: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of hidden states, weight and bias, those that are needed, with the scores made again."""
    hidden, weight, bias = _as_product(head, hidden_NH, weight_VH, bias_V)
    wide = _wide(hidden.dtype)
    gradient_NH = torch.empty_like(hidden_NH) if needed[0] else None
    weight_gradient_VH = torch.zeros_like(weight_VH, dtype=wide) if needed[1] else None
    bias_gradient_V = torch.zeros(len(weight_VH), dtype=wide, device=hidden.device) if needed[2] else None
    for part in _chunks(len(hidden), head.rows_of_a_chunk):
        _, slopes_CV = _slopes(loss, part, hidden, weight, bias, head, wanted=True)
        assert slopes_CV is not None
        slopes_CV.mul_(upstream_N[part, None])
        if bias_gradient_V is not None:
            bias_gradient_V += slopes_CV.sum(0)
        slopes_CV = slopes_CV.to(weight.dtype)
        if gradient_NH is not None:
            gradient_NH[part] = slopes_CV @ weight
        if weight_gradient_VH is not None:
            _add_outer(weight_gradient_VH, slopes_CV, hidden[part])
    return (
        gradient_NH,
        None if weight_gradient_VH is None else weight_gradient_VH.to(weight_VH.dtype),
        None if bias_gradient_V is None or bias_V is None else bias_gradient_V.to(bias_V.dtype),
    )


def _slopes(
    loss: ChunkLoss, part: slice, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, *, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses of a chunk and their slopes in ``W h + b``: of a score ``scale * (1 - (score / softcap)^2)``."""
    scores_CV = _chunk_scores(hidden[part], weight, bias, head)
    softcap_slope_CV = None
    if wanted and head.softcap is not None:  # Before the scores are overwritten.
        softcap_slope_CV = (scores_CV / head.softcap).square_().neg_().add_(1).mul_(head.scale)
    losses_C, slopes_CV = loss(part, scores_CV, wanted)
    if slopes_CV is not None and softcap_slope_CV is not None:
        slopes_CV.mul_(softcap_slope_CV)
    elif slopes_CV is not None and head.scale != 1:
        slopes_CV.mul_(head.scale)
    return losses_C, slopes_CV


def _chunks(rows: int, rows_of_a_chunk: int) -> Iterator[slice]:
    return (slice(start, start + rows_of_a_chunk) for start in range(0, rows, rows_of_a_chunk))


def _as_product(
    head: Head, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = head.product_dtype
    return hidden_NH.to(dtype), weight_VH.to(dtype), None if bias_V is None else bias_V.to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunk_scores(hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, head: Head) -> Tensor:
    """``[C, V]`` scores of one chunk in float32 (float64 from float64), from tensors in the type of the product."""
    scores_CV = functional.linear(hidden_CH, weight_VH, bias_V)
    if scores_CV.dtype != torch.float64:
        scores_CV = scores_CV.float()
    if head.scale != 1:
        scores_CV.mul_(head.scale)
    return scores_CV if head.softcap is None else scores_CV.div_(head.softcap).tanh_().mul_(head.softcap)


def _add_outer(total_VH: Tensor, slope_CV: Tensor, hidden_CH: Tensor) -> None:
    """``total += slope^T hidden``: one chunk's part of the gradient of the head's weight.

    Products of a narrower type than the total's are added up in slices of the vocabulary, so that no second ``[V, H]``
    is needed; the total itself is wide, since sums of many bfloat16 chunks would lose the later ones.
    """
    if total_VH.dtype == slope_CV.dtype:
        total_VH.addmm_(slope_CV.T, hidden_CH)
        return
    for part in _chunks(len(total_VH), max(1, CHUNK_BYTES // (4 * total_VH.shape[1]))):
        total_VH[part] += slope_CV[:, part].T @ hidden_CH
