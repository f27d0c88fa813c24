"""GradDiff: gradient ascent on harmful answers and, at once, a term that keeps the normal ones.

Two methods: ``grad_diff`` learns the normal answers (cross-entropy), ``grad_diff_kl`` holds the original model's
predictions on them (forward KL): ``ascent_term`` and ``retain_term``.
Papers: arXiv 2203.12817 (Liu et al.) and 2401.06121 (TOFU: "Gradient Difference" and "KL Minimization").

Source: ``grad_diff`` and ``KL`` in the trainer of licong-lin/negative-preference-optimization (TOFU), weights 1 and 1.
"""

from __future__ import annotations

from sku.config.check import NotNegative, validated
from sku.methods.base import Method, RetainKind, TermWeights, retain_term
from sku.methods.gradient_ascent import ascent_term
from sku.training.objective import Objective


@validated
class GradDiffSettings(TermWeights):
    """Weights of GradDiff; 0 leaves a term and its rows out."""

    forget_weight: NotNegative = 1.0
    """Weight of the ascent on harmful answers."""
    retain_weight: NotNegative = 1.0
    """Weight of the term on normal pairs."""


def _objective(settings: GradDiffSettings, kind: RetainKind) -> Objective:
    return Objective.of({"ascent": ascent_term(settings.forget_weight), **retain_term(kind, settings.retain_weight)})


GRAD_DIFF = Method(
    name="grad_diff",
    title="GradDiff",
    paper_url="https://arxiv.org/abs/2401.06121",
    settings=GradDiffSettings,
    objective=lambda settings, _model: _objective(settings, "gd"),
)
GRAD_DIFF_KL = Method(
    name="grad_diff_kl",
    title="GradDiff (KL)",
    paper_url="https://arxiv.org/abs/2401.06121",
    settings=GradDiffSettings,
    objective=lambda settings, _model: _objective(settings, "kl"),
)
