"""GA: gradient ascent on the loss of the harmful answers, so that the model stops giving them.

Nothing keeps normal behaviour, and the loss has no lower bound: steps and learning rate decide how far it goes. Paper:
arXiv 2210.01504 (Jang et al.); a baseline of arXiv 2402.10058 (SKU).
Shapes: N = answer tokens of all harmful rows, B = joint examples, V = vocabulary.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from sku.data.joint import FORGET
from sku.head import Scores
from sku.losses import answer_nll, mean_per_example
from sku.methods.base import Method, NoSettings
from sku.training.objective import Objective, Term, TrainingStep


def gradient_ascent_loss(scores_NV: Scores, targets_N: Tensor, example_N: Tensor, num_examples: int) -> Tensor:
    """Log-likelihood of each harmful answer, averaged over its tokens; minimising it makes the answer unlikely.

    ``L_GA,i = 1/|y_i| sum_t log p(y_it | x_i, y_i<t)``

    Args:
        scores_NV: Scores of the model in training at the position before each answer token.
        targets_N: The answer tokens; prompt and padding are not among them.
        example_N: Which joint example each token belongs to.
        num_examples: B.

    Returns:
        ``[B]`` float32, nats per token, 0 or less.

    Raises:
        ValueError: The shapes don't fit.

    Source: arXiv 2210.01504, which sums over all tokens of a text; here over the answer's alone and divided by their
        number, as in ``get_answer_loss("ga", ...)`` of kevinyaobytedance/llm_unlearn, so that the terms of all methods
        have one unit.
    """
    return -mean_per_example(answer_nll(scores_NV, targets_N), example_N, num_examples)


def ascent_term(weight: float) -> Term:
    """``gradient_ascent_loss`` of a batch's harmful rows."""

    def loss(step: TrainingStep) -> Tensor:
        rows = step.rows(FORGET)
        return gradient_ascent_loss(rows.scores_NV, rows.targets_N, rows.example_N, rows.num_examples)

    return Term(weight=weight, loss=loss, rows={"forget": True})


def _objective(_settings: NoSettings, _model: PreTrainedModel) -> Objective:
    return Objective.of({"ascent": ascent_term(1.0)})


GRADIENT_ASCENT = Method(
    name="gradient_ascent",
    title="GA",
    paper_url="https://arxiv.org/abs/2210.01504",
    settings=NoSettings,
    objective=_objective,
)
