"""Safe Unlearning: harmful answers are unlearned and safe ones to the same prompts are learned, normal ones kept.

A prompt whose data has no safe answer gets one of ``data.joint.REFUSALS``. Paper: arXiv 2407.02855 (Zhang et al.,
"From Theft to Bomb-Making", at first "Safe Unlearning"). Shapes: B = joint examples.

Source: ``SafeUnlearningTrainer`` in ft_code/trainers.py of thu-coai/SafeUnlearning, which takes one mean over the
tokens of all safe, and of all normal rows of a batch; here each term is a mean over its own rows. It trains all
weights.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from sku.config.check import NotNegative, Positive, validated
from sku.data.examples import RowType
from sku.methods.base import Method, TermWeights, check_alike, retain_term
from sku.methods.refusal_tuning import safe_term
from sku.training.objective import Objective, Term


@validated
class SafeUnlearningSettings(TermWeights):
    """Settings of Safe Unlearning. Defaults: the authors' for Vicuna-7B; a weight of 0 leaves a term out."""

    beta: Positive = 1.0
    """Inverse temperature of the likelihood per token."""
    forget_weight: NotNegative = 0.3
    """alpha, weight of the harmful answers."""
    safe_weight: NotNegative = 0.5
    """theta, weight of the safe answers."""
    retain_weight: NotNegative = 1.0
    """Weight of the normal answers."""


def safe_unlearning_loss(mean_nll_B: Tensor, reference_mean_nll_B: Tensor, *, beta: float) -> Tensor:
    """NPO on the likelihood per token of harmful answers.

    ``L_i = -log sigmoid(-beta / |y_i| (log p(y_i | x_i) - log p_ref(y_i | x_i)))``

    Args:
        mean_nll_B: ``-log p(y | x) / |y|`` of the model in training over the answer's tokens, nats per token.
        reference_mean_nll_B: The same of the original model; detached inside.
        beta: Inverse temperature.

    Returns:
        ``[B]`` float32, above 0; ``log 2`` where both models agree.

    Raises:
        ValueError: The shapes differ.

    Source: unlearning term of arXiv 2407.02855, as ``SafeUnlearningTrainer.compute_loss`` has it. NPO's factor of
        ``2 / beta`` is not there.
    """
    check_alike(mean_nll_B, reference_mean_nll_B)
    return -functional.logsigmoid(beta * (mean_nll_B - reference_mean_nll_B.detach()))


def _objective(settings: SafeUnlearningSettings, _model: PreTrainedModel) -> Objective:
    forget = Term(
        weight=settings.forget_weight,
        loss=lambda step: safe_unlearning_loss(
            step.rows(RowType.FORGET).mean_nll(), step.reference(RowType.FORGET).mean_nll(), beta=settings.beta
        ),
        rows={"forget": True},
        reference=True,
    )
    return Objective.of(
        {
            "forget": forget,
            "safe": safe_term(settings.safe_weight),
            **retain_term("gd", settings.retain_weight),
        }
    )


SAFE_UNLEARNING = Method(
    name="safe_unlearning",
    title="Safe Unlearning",
    paper_url="https://arxiv.org/abs/2407.02855",
    settings=SafeUnlearningSettings,
    objective=_objective,
)
