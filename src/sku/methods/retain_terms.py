"""What keeps a baseline's model good on normal prompts: its answers are learned, or its predictions held.

``gd`` (gradient descent) is the cross-entropy of the normal answers, ``kl`` the divergence from the original model on
them. Names and meaning as in TOFU, arXiv 2401.06121 ("Gradient Difference" and "KL Minimization").
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sku.data.joint import RETAIN
from sku.losses import mean_per_example, token_kl
from sku.training.objective import Term, TrainingStep

RetainKind = Literal["gd", "kl", "none"]


def retain_term(kind: RetainKind, weight: float = 1.0) -> dict[str, Term]:
    """The term on normal pairs under its name in the log, ``retain`` or ``retain_kl``; empty for ``none``.

    ``gd``: ``L_i = 1/|y_i| sum_t -log p(y_it | x_i, y_i<t)``, nats per token.

    ``kl``: ``L_i = 1/|y_i| sum_t KL(P_t || Q_t)`` with P the original model and Q the model in training, at the
    positions before the answer's tokens.

    Source: "Gradient Difference", arXiv 2401.06121 and 2203.12817; "KL Minimization" of arXiv 2401.06121. The NPO
        authors' code averages the divergence over prompt and padding too.
    """

    def kl(step: TrainingStep) -> Tensor:
        rows = step.rows(RETAIN)
        kl_N = token_kl(step.reference(RETAIN).scores_NV, rows.scores_NV)
        return mean_per_example(kl_N, rows.example_N, rows.num_examples)

    if kind == "none":
        return {}
    if kind == "gd":
        return {"retain": Term(weight=weight, loss=lambda step: step.rows(RETAIN).mean_nll(), rows={"retain": True})}
    return {"retain_kl": Term(weight=weight, loss=kl, rows={"retain": True}, reference=True)}
