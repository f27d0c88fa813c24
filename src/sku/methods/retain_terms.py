"""What keeps a baseline's model good on normal prompts: its answers are learned, or its predictions held.

``gd`` (gradient descent) is the cross-entropy of the normal answers, ``kl`` the divergence from the original model on
them. Names and meaning as in TOFU, arXiv 2401.06121 ("Gradient Difference" and "KL Minimization").
Shapes: N = answer tokens of all normal rows, B = joint examples, V = vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sku.data.joint import RETAIN
from sku.head.scores import Scores
from sku.losses import answer_nll, mean_per_example, token_kl
from sku.training.objective import TrainingStep

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


@dataclass(frozen=True, kw_only=True)
class RetainTerm:
    """The part of an objective that works on normal pairs."""

    kind: RetainKind
    weight: float = 1.0

    @property
    def is_on(self) -> bool:
        """Whether the term, and so the normal pair, is used at all."""
        return self.kind != "none" and self.weight > 0

    @property
    def needs_reference(self) -> bool:
        """Whether the original model is asked."""
        return self.is_on and self.kind == "kl"

    @property
    def weights(self) -> dict[str, float]:
        """Name in the log, ``retain`` or ``retain_kl``, -> weight; empty where the term is off."""
        name = "retain_kl" if self.kind == "kl" else "retain"
        return {name: float(self.weight)} if self.is_on else {}

    def losses(self, step: TrainingStep) -> dict[str, Tensor]:
        """The term under its name, ``[B]``, nats per token; empty where it is off."""
        if not self.is_on:
            return {}
        rows = step.rows(RETAIN)
        if self.kind == "gd":
            return {"retain": retain_nll_loss(rows.scores_NV, rows.targets_N, rows.example_N, rows.num_examples)}
        reference_NV = step.reference(RETAIN).scores_NV
        return {"retain_kl": retain_kl_loss(reference_NV, rows.scores_NV, rows.example_N, rows.num_examples)}
