"""What the authors' public code computes where it departs from the paper, on purpose and each alone (``compat``).

Written anew from what that code does (franciscoliu/SKU, ``utils.py`` at a17663f; it has no licence). What each costs
is said in ``CompatConfig``. Shapes: N = kept positions of all rows, M = rows, E = normal examples, V = vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sku.head import Scores
from sku.losses import answer_nll, mean_per_example, sum_per_example

QUESTION_START = 3
"""Index of the first target of a mismatched row under ``compat.question_tokens``. Weights begin at index 2, the number
of fields of a tokenizer's output, and the logits there predict the next token."""
_OFFSET = 1e-12


def diluted_nll(scores_NV: Scores, targets_N: Tensor, row_N: Tensor, positions_to_end_M: Tensor) -> Tensor:
    """Negative log-likelihood of each row's targets, with pads in the denominator (``compat.pad_dilution``).

    ``L_m = 1/(L - s_m) sum_t -log p(y_mt | y_m<t)`` with L the padded length and s_m the position whose logits predict
    the first target. The last position of the row predicts nothing and is counted all the same.

    Args:
        scores_NV: Scores of the model in training at the position before each target.
        targets_N: Tokens that are learned; padding is not among them.
        row_N: Which row, 0 to M-1, each target belongs to.
        positions_to_end_M: ``L - s`` of each row.

    Returns:
        ``[M]`` float32, nats per position.

    Raises:
        ValueError: The shapes don't fit.

    Source: what ``get_answer_loss("gd", ...)`` does where the pad id is not 1.
    """
    nll_N = answer_nll(scores_NV, targets_N)
    return sum_per_example(nll_N, row_N, len(positions_to_end_M)) / positions_to_end_M


def unbounded_divergence_loss(
    reference_logits_NV: Tensor, logits_NV: Tensor, example_N: Tensor, num_examples: int
) -> Tensor:
    """Preservation divergence from two softmaxes, without a cap (``compat.unbounded_divergence``).

    ``L_PD,i = -1/|n_i| sum_t sum_v P_t(v) log((P_t(v) + 1e-12) / Q_t(v))`` with P the original model and Q the model
    in training. An underflowing Q makes it -inf, or NaN where P is 0 as well.

    Args:
        reference_logits_NV: P's scores; detached inside.
        logits_NV: Q's scores at the same positions.
        example_N: Which normal example each position belongs to.
        num_examples: E.

    Returns:
        ``[E]`` float32, nats per position.

    Raises:
        ValueError: The shapes don't fit.

    Source: what ``compute_reverse_kl`` does, whose models are held in float32.
    """
    if reference_logits_NV.shape != logits_NV.shape:
        raise ValueError(
            f"reference logits {tuple(reference_logits_NV.shape)} and logits {tuple(logits_NV.shape)} differ in shape"
        )
    p_NV = reference_logits_NV.detach().softmax(dim=-1, dtype=torch.float32)
    q_NV = logits_NV.softmax(dim=-1, dtype=torch.float32)
    divergence_N = (p_NV * ((p_NV + _OFFSET) / q_NV).log()).sum(-1)
    return -mean_per_example(divergence_N, example_N, num_examples)
