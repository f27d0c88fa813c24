"""NPO: negative preference optimization, gradient ascent that lets go of answers the model no longer gives.

Harmful answers are the rejected half of DPO, without a preferred one; a retain term keeps the normal answers. Paper:
arXiv 2404.05868 (Zhang et al.). Shapes: B = joint examples.
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
class NpoSettings(TermWeights):
    """Settings of NPO. Defaults: ``npo_grad_diff`` of the authors' ``config/forget.yaml``."""

    beta: Positive = 0.1
    """Inverse temperature. Towards 0 the method becomes gradient ascent."""
    forget_weight: NotNegative = 1.0
    """Weight of the loss on harmful answers; 0 leaves it out."""
    retain: RetainKind = "gd"
    """Term on normal pairs: ``gd`` cross-entropy, ``kl`` KL(P||Q) with P the original model, ``none``."""
    retain_weight: NotNegative = 1.0
    """Its weight; 0 leaves it and its rows out."""


def npo_loss(nll_B: Tensor, reference_nll_B: Tensor, *, beta: float) -> Tensor:
    """NPO on whole harmful answers.

    ``L_i = -(2 / beta) log sigmoid(-beta (log p(y_i | x_i) - log p_ref(y_i | x_i)))``

    Its slope in ``log p`` is that of gradient ascent times ``2 sigmoid(beta (log p - log p_ref))``: 1 at the start,
    towards 0 as the answer becomes unlikely.

    Args:
        nll_B: ``-log p(y | x)`` of the model in training, summed over the answer's tokens: nats, not nats per token.
        reference_nll_B: The same of the original model; detached inside.
        beta: Inverse temperature.

    Returns:
        ``[B]`` float32, nats, above 0; ``(2 / beta) log 2`` where both models agree.

    Raises:
        ValueError: The shapes differ.

    Source: the NPO loss of arXiv 2404.05868; ``npo`` in the trainer of licong-lin/negative-preference-optimization.
        There the answer ends with an end token; here harmful answers are trained on without one, for every method.
    """
    check_alike(nll_B, reference_nll_B)
    return -2 / beta * functional.logsigmoid(beta * (nll_B - reference_nll_B.detach()))


def _objective(settings: NpoSettings, _model: PreTrainedModel) -> Objective:
    forget = Term(
        weight=settings.forget_weight,
        loss=lambda step: npo_loss(
            step.rows(RowType.FORGET).total_nll(), step.reference(RowType.FORGET).total_nll(), beta=settings.beta
        ),
        rows={"forget": True},
        reference=True,
    )
    return Objective.of({"forget": forget, **retain_term(settings.retain, settings.retain_weight)})


NPO = Method(
    name="npo",
    title="NPO",
    paper_url="https://arxiv.org/abs/2404.05868",
    settings=NpoSettings,
    objective=_objective,
)
