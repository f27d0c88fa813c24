"""GA+Mismatch: gradient ascent, random normal answers after the harmful prompt, and predictions held on normal pairs.

``L = e1 * L_ascent + e2 * L_mismatch + e3 * L_retain_kl``: ``ascent_term`` on the harmful answers, the mean
cross-entropy of K normal answers after the harmful prompt (the equation is that of ``random_disassociation_loss``,
the answers are normal ones), and ``retain_term``, forward KL(P||Q) with P the original model. Paper: arXiv
2310.10683 (Yao et al.).

Source: weights and K of ``unlearn_harm.py`` in kevinyaobytedance/llm_unlearn at 1143a5b. There the third term is the
cross-entropy -P log Q, which differs from the KL by a constant, over prompt and padding too; one draw of K answers
serves the whole batch, and wrong TruthfulQA answers are drawn as well. Here answers alone count, each prompt has its
own draw, and the answers are those of ``retain_train``.
"""

from __future__ import annotations

from sku.config.check import Count, NotNegative, validated
from sku.methods.base import Method, TermWeights, retain_term
from sku.methods.gradient_ascent import ascent_term
from sku.methods.sku import random_disassociation
from sku.training.objective import Objective, Term


@validated
class GradientAscentMismatchSettings(TermWeights):
    """Weights and K of GA+Mismatch; a weight of 0 leaves its term and rows out."""

    forget_weight: NotNegative = 0.5
    """e1, weight of the ascent on harmful answers."""
    mismatch_weight: NotNegative = 1.0
    """e2, weight of the random normal answers."""
    retain_weight: NotNegative = 1.0
    """e3, weight of KL(P||Q) on normal pairs."""
    random_answers: Count = 5
    """K, the normal answers put after each harmful prompt."""


GRADIENT_ASCENT_MISMATCH = Method(
    name="gradient_ascent_mismatch",
    title="GA+Mismatch",
    paper_url="https://arxiv.org/abs/2310.10683",
    settings=GradientAscentMismatchSettings,
    objective=lambda settings, _model: Objective.of(
        {
            "ascent": ascent_term(settings.forget_weight),
            "mismatch": Term(
                weight=settings.mismatch_weight,
                loss=random_disassociation,
                rows={"mismatched": settings.random_answers, "mismatched_from": "retain"},
            ),
            **retain_term("kl", settings.retain_weight),
        }
    ),
)
