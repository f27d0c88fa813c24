"""What the modules of stage 1 and the baselines share: tensors in, tensors out.

Shapes: N = kept positions of all rows (those whose next token counts), E = examples, V = vocabulary.
Padding never reaches these functions: the caller keeps the positions that count and drops the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sku.head import HeadScores, Scores, chunked_kl, chunked_nll, logits_of

IGNORE_INDEX = -100
"""Label of a token that is not trained on."""


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
    if isinstance(scores_NV, HeadScores):
        return chunked_nll(scores_NV, targets_N)
    if scores_NV.dim() != 2 or targets_N.shape != scores_NV.shape[:1]:
        raise ValueError(f"logits {tuple(scores_NV.shape)} and targets {tuple(targets_N.shape)} don't fit")
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
    if isinstance(reference_NV, HeadScores) and isinstance(scores_NV, HeadScores):
        return chunked_kl(reference_NV, scores_NV)
    reference_logits_NV, logits_NV = logits_of(reference_NV), logits_of(scores_NV)
    if logits_NV.dim() != 2 or reference_logits_NV.shape != logits_NV.shape:
        raise ValueError(
            f"reference logits {tuple(reference_logits_NV.shape)} and logits {tuple(logits_NV.shape)} differ in shape"
        )
    log_p = functional.log_softmax(reference_logits_NV.detach().float(), dim=-1)
    log_q = functional.log_softmax(logits_NV.float(), dim=-1)
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
