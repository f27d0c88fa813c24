"""GA: gradient ascent on the loss of the harmful answers, so that the model stops giving them.

Nothing keeps normal behaviour, and the loss has no lower bound: steps and learning rate decide how far it goes. Paper:
arXiv 2210.01504 (Jang et al.); a baseline of arXiv 2402.10058 (SKU).
"""

from __future__ import annotations

from sku.data.examples import RowType
from sku.methods.base import Method, NoSettings
from sku.training.objective import Objective, Term


def ascent_term(weight: float) -> Term:
    """Log-likelihood of each harmful answer, averaged over its tokens; minimising it makes the answer unlikely.

    ``L_GA,i = 1/|y_i| sum_t log p(y_it | x_i, y_i<t)``, nats per token, 0 or less.

    Args:
        weight: Of the term.

    Source: arXiv 2210.01504, which sums over all tokens of a text; here over the answer's alone and divided by their
        number, as in ``get_answer_loss("ga", ...)`` of kevinyaobytedance/llm_unlearn, so that the terms of all methods
        have one unit.
    """
    return Term(weight=weight, loss=lambda step: -step.rows(RowType.FORGET).mean_nll(), rows={"forget": True})


GRADIENT_ASCENT = Method(
    name="gradient_ascent",
    title="GA",
    paper_url="https://arxiv.org/abs/2210.01504",
    settings=NoSettings,
    objective=lambda _settings, _model: Objective.of({"ascent": ascent_term(1.0)}),
)
