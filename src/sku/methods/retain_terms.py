"""What keeps a baseline's model good on normal prompts: its answers are learned, or its predictions held.

``gd`` (gradient descent) is the cross-entropy of the normal answers, ``kl`` the divergence from the original model on
them. Names and meaning as in TOFU, arXiv 2401.06121 ("Gradient Difference" and "KL Minimization").
Shapes: N = answer tokens of all normal rows, B = joint examples, V = vocabulary.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sku.data.joint import RETAIN
from sku.head import Scores
from sku.losses import answer_nll, mean_per_example, token_kl
from sku.training.objective import Term, TrainingStep

RetainKind = Literal["gd", "kl", "none"]


def retain_nll_loss(scores_NV: Scores, targets_N: Tensor, example_N: Tensor, num_examples: int) -> Tensor:
    """Negative log-likelihood of each normal answer, averaged over its tokens.

    ``L_i = 1/|y_i| sum_t -log p(y_it | x_i, y_i<t)``

    Args:
        scores_NV: Scores of the model in training at the position before each answer token.
        targets_N: The answer tokens; prompt and padding are not among them.
        example_N: Which joint example each token belongs to.
        num_examples: B.

    Returns:
        ``[B]`` float32, nats per token.

    Raises:
        ValueError: The shapes don't fit.

    Source: retain term of "Gradient Difference", arXiv 2401.06121 and 2203.12817.
    """
    return mean_per_example(answer_nll(scores_NV, targets_N), example_N, num_examples)


def retain_kl_loss(reference_NV: Scores, scores_NV: Scores, example_N: Tensor, num_examples: int) -> Tensor:
    """Forward divergence from the original model on each normal example, averaged over its answer's positions.

    ``L_i = 1/|y_i| sum_t KL(P_t || Q_t)`` with P the original model and Q the model in training.

    Args:
        reference_NV: P's scores at the position before each answer token; detached inside.
        scores_NV: Q's scores at the same positions. Prompt and padding are not among them.
        example_N: Which joint example each position belongs to.
        num_examples: B.

    Returns:
        ``[B]`` float32, nats per token.

    Raises:
        ValueError: The shapes don't fit.

    Source: "KL Minimization" of arXiv 2401.06121. The NPO authors' code averages over prompt and padding too.
    """
    return mean_per_example(token_kl(reference_NV, scores_NV), example_N, num_examples)


def retain_term(kind: RetainKind, weight: float = 1.0) -> dict[str, Term]:
    """The term on normal pairs under its name in the log, ``retain`` or ``retain_kl``; empty for ``none``."""

    def nll(step: TrainingStep) -> Tensor:
        rows = step.rows(RETAIN)
        return retain_nll_loss(rows.scores_NV, rows.targets_N, rows.example_N, rows.num_examples)

    def kl(step: TrainingStep) -> Tensor:
        rows = step.rows(RETAIN)
        return retain_kl_loss(step.reference(RETAIN).scores_NV, rows.scores_NV, rows.example_N, rows.num_examples)

    if kind == "none":
        return {}
    if kind == "gd":
        return {"retain": Term(weight=weight, loss=nll, rows={"retain": True})}
    return {"retain_kl": Term(weight=weight, loss=kl, rows={"retain": True}, reference=True)}
