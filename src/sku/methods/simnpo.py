"""SimNPO: NPO without a reference model; the likelihood of an answer is taken per token instead.

Paper: arXiv 2410.07163 (Fan et al.). Shapes: B = joint examples.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from sku.config.check import NotNegative, Positive, validated
from sku.data.examples import RowType
from sku.methods.base import Method, RetainKind, TermWeights, retain_term
from sku.training.objective import Objective, Term


@validated
class SimNpoSettings(TermWeights):
    """Settings of SimNPO. Defaults: the authors' run on TOFU forget05 (``beta=2.5 npo_coeff=0.1375``, gamma 0).

    They tune beta and the weights per task: 4.5 and 0.125 on forget10.
    """

    beta: Positive = 2.5
    """Inverse temperature of the likelihood per token."""
    gamma: NotNegative = 0.0
    """Margin, subtracted inside the sigmoid."""
    forget_weight: NotNegative = 0.1375
    """Weight of the loss on harmful answers; 0 leaves it out."""
    retain: RetainKind = "gd"
    """Term on normal pairs: ``gd`` cross-entropy, ``kl`` KL(P||Q) with P the original model, ``none``."""
    retain_weight: NotNegative = 1.0
    """Its weight; 0 leaves it and its rows out."""


def simnpo_loss(mean_nll_B: Tensor, *, beta: float, gamma: float) -> Tensor:
    """SimNPO on whole harmful answers.

    ``L_i = -(2 / beta) log sigmoid(-(beta / |y_i|) log p(y_i | x_i) - gamma)``

    Args:
        mean_nll_B: ``-log p(y | x) / |y|`` of the model in training over the answer's tokens, nats per token.
        beta: Inverse temperature.
        gamma: Margin; it is not multiplied by beta.

    Returns:
        ``[B]`` float32, nats per token, above 0.

    Source: equation of arXiv 2410.07163 as on the authors' model cards (OPTML-Group/SimNPO-TOFU-forget05). Their
        code (``simnpo`` in TOFU/dataloader.py of OPTML-Group/Unlearn-Simple) multiplies gamma by beta as well, which
        is the same at its gamma of 0.
    """
    return -2 / beta * functional.logsigmoid(beta * mean_nll_B - gamma)


def _objective(settings: SimNpoSettings, _model: PreTrainedModel) -> Objective:
    forget = Term(
        weight=settings.forget_weight,
        loss=lambda step: simnpo_loss(step.rows(RowType.FORGET).mean_nll(), beta=settings.beta, gamma=settings.gamma),
        rows={"forget": True},
    )
    return Objective.of({"forget": forget, **retain_term(settings.retain, settings.retain_weight)})


SIMNPO = Method(
    name="simnpo",
    title="SimNPO",
    paper_url="https://arxiv.org/abs/2410.07163",
    settings=SimNpoSettings,
    objective=_objective,
)
