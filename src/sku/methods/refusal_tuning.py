"""Refusal tuning: fine-tuning on safe answers to the harmful prompts, and on normal answers to normal ones.

A prompt whose data has no safe answer gets one of ``data.joint.REFUSALS``. The model learns to refuse; nothing makes
it forget. TOFU, arXiv 2401.06121, calls it "preference optimization" where the answers say "I don't know".

Source: ``idk`` in the TOFU trainer of licong-lin/negative-preference-optimization, which takes one mean over the
tokens of both halves; here each term is a mean over its own rows and has a weight.
"""

from __future__ import annotations

from sku.config.check import NotNegative, validated
from sku.data.examples import RowType
from sku.methods.base import Method, TermWeights, retain_term
from sku.training.objective import Objective, Term


@validated
class RefusalTuningSettings(TermWeights):
    """Weights of refusal tuning; 0 leaves a term and its rows out."""

    refusal_weight: NotNegative = 1.0
    """Weight of the safe answers."""
    retain_weight: NotNegative = 1.0
    """Weight of the normal answers."""


def safe_term(weight: float) -> Term:
    """Negative log-likelihood of each safe answer, averaged over its tokens.

    ``L_i = 1/|s_i| sum_t -log p(s_it | x_i, s_i<t)`` with x the harmful prompt and s the safe answer, nats per token.
    """
    return Term(weight=weight, loss=lambda step: step.rows(RowType.SAFE).mean_nll(), rows={"safe": "data or refusal"})


REFUSAL_TUNING = Method(
    name="refusal_tuning",
    title="Refusal tuning",
    paper_url="https://arxiv.org/abs/2401.06121",
    settings=RefusalTuningSettings,
    objective=lambda settings, _model: Objective.of(
        {"refusal": safe_term(settings.refusal_weight), **retain_term("gd", settings.retain_weight)}
    ),
)
