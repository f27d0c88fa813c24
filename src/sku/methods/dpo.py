"""DPO: direct preference optimization of the safe answer over the harmful one to the same prompt.

Trains only on harmful prompts for which the data has a safe answer. Paper: arXiv 2305.18290 (Rafailov et al.).
Shapes: B = joint examples.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from sku.config.check import NotNegative, Positive, validated
from sku.data.examples import RowType
from sku.methods.base import Method, RetainKind, TermWeights, check_alike, retain_term
from sku.training.objective import Objective, Term


@validated
class DpoSettings(TermWeights):
    """Settings of DPO; the paper has no retain term."""

    beta: Positive = 0.1
    """Inverse temperature: how dearly a difference from the original model is bought."""
    preference_weight: NotNegative = 1.0
    """Weight of the preference; 0 leaves it and its rows out."""
    retain: RetainKind = "none"
    """Term on normal pairs: ``gd`` cross-entropy, ``kl`` KL(P||Q) with P the original model, ``none``."""
    retain_weight: NotNegative = 1.0
    """Its weight; 0 leaves it and its rows out."""


def dpo_loss(
    safe_nll_B: Tensor, harmful_nll_B: Tensor, reference_safe_nll_B: Tensor, reference_harmful_nll_B: Tensor, *,
    beta: float,
) -> Tensor:  # fmt: skip
    """Preference of the safe answer over the harmful one, relative to the original model.

    ``L_i = -log sigmoid(beta ((log p(y_s|x) - log p_ref(y_s|x)) - (log p(y_h|x) - log p_ref(y_h|x))))``

    Args:
        safe_nll_B: ``-log p(y_s | x)`` of the model in training, summed over the safe answer's tokens, nats.
        harmful_nll_B: The same of the harmful answer.
        reference_safe_nll_B: That of the original model on the safe answer; detached inside.
        reference_harmful_nll_B: That of the original model on the harmful answer; detached inside.
        beta: Inverse temperature.

    Returns:
        ``[B]`` float32, nats, above 0; ``log 2`` where both models agree.

    Raises:
        ValueError: The shapes differ.

    Source: the DPO objective of arXiv 2305.18290. Safe answers are trained on with their end token, harmful ones
        without.
    """
    check_alike(safe_nll_B, harmful_nll_B, reference_safe_nll_B, reference_harmful_nll_B)
    gain_B = reference_safe_nll_B.detach() - safe_nll_B
    loss_B = reference_harmful_nll_B.detach() - harmful_nll_B
    return -functional.logsigmoid(beta * (gain_B - loss_B))


def _objective(settings: DpoSettings, _model: PreTrainedModel) -> Objective:
    preference = Term(
        weight=settings.preference_weight,
        loss=lambda step: dpo_loss(
            step.rows(RowType.SAFE).total_nll(),
            step.rows(RowType.FORGET).total_nll(),
            step.reference(RowType.SAFE).total_nll(),
            step.reference(RowType.FORGET).total_nll(),
            beta=settings.beta,
        ),
        rows={"forget": True, "safe": "data"},
        reference=True,
    )
    return Objective.of({"preference": preference, **retain_term(settings.retain, settings.retain_weight)})


DPO = Method(
    name="dpo",
    title="DPO",
    paper_url="https://arxiv.org/abs/2305.18290",
    settings=DpoSettings,
    objective=_objective,
)
