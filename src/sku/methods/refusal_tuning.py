"""Refusal tuning: fine-tuning on safe answers to the harmful prompts, and on normal answers to normal ones.

A prompt whose data has no safe answer gets one of ``data.joint.REFUSALS``. The model learns to refuse; nothing makes
it forget. TOFU, arXiv 2401.06121, calls it "preference optimization" where the answers say "I don't know".
Shapes: N = answer tokens of all safe rows, B = joint examples, V = vocabulary.

Source: ``idk`` in the TOFU trainer of licong-lin/negative-preference-optimization, which takes one mean over the
tokens of both halves; here each term is a mean over its own rows and has a weight.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from sku.config.check import NotNegative, validated
from sku.data.joint import SAFE
from sku.head import Scores
from sku.losses import answer_nll, mean_per_example
from sku.methods.base import Method, check_weights
from sku.methods.retain_terms import retain_term
from sku.training.objective import Objective, Term, TrainingStep


@validated
class RefusalTuningSettings:
    """Weights of refusal tuning; 0 leaves a term and its rows out."""

    refusal_weight: NotNegative = 1.0
    """Weight of the safe answers."""
    retain_weight: NotNegative = 1.0
    """Weight of the normal answers."""

    def __post_init__(self) -> None:
        check_weights("refusal_tuning", refusal_weight=self.refusal_weight, retain_weight=self.retain_weight)


def refusal_loss(scores_NV: Scores, targets_N: Tensor, example_N: Tensor, num_examples: int) -> Tensor:
    """Negative log-likelihood of each safe answer, averaged over its tokens.

    ``L_i = 1/|s_i| sum_t -log p(s_it | x_i, s_i<t)`` with x the harmful prompt and s the safe answer.

    Args:
        scores_NV: Scores of the model in training at the position before each answer token.
        targets_N: The answer tokens; prompt and padding are not among them.
        example_N: Which joint example each token belongs to.
        num_examples: B.

    Returns:
        ``[B]`` float32, nats per token.

    Raises:
        ValueError: The shapes don't fit.
    """
    return mean_per_example(answer_nll(scores_NV, targets_N), example_N, num_examples)


def safe_term(weight: float) -> Term:
    """``refusal_loss`` of a batch's safe rows."""

    def loss(step: TrainingStep) -> Tensor:
        rows = step.rows(SAFE)
        return refusal_loss(rows.scores_NV, rows.targets_N, rows.example_N, rows.num_examples)

    return Term(weight=weight, loss=loss, rows={"safe": "data or refusal"})


def _objective(settings: RefusalTuningSettings, _model: PreTrainedModel) -> Objective:
    return Objective.of({"refusal": safe_term(settings.refusal_weight), **retain_term("gd", settings.retain_weight)})


REFUSAL_TUNING = Method(
    name="refusal_tuning",
    title="Refusal tuning",
    paper_url="https://arxiv.org/abs/2401.06121",
    settings=RefusalTuningSettings,
    objective=_objective,
)
