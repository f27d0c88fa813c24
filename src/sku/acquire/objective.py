"""The objective of stage 1: three modules, each with its weight; a weight of 0 leaves a module out with its cost."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from sku.acquire.guided_distortion import guided_distortion_loss
from sku.acquire.preservation_divergence import preservation_divergence_loss
from sku.acquire.random_disassociation import random_disassociation_loss
from sku.config import AcquireConfig
from sku.data.joint import FORGET, MISMATCHED, RETAIN, RowPlan
from sku.training.objective import Losses, Objective, TrainingStep


def sku_objective(config: AcquireConfig) -> Objective:
    """What stage 1 minimises.

    Args:
        config: Weights, K, and how preservation divergence is read; the rest is not used.

    Returns:
        The objective, with a term for each module that is on.
    """
    weights = dataclasses.asdict(config.weights)
    terms = {name: term for name, term in _TERMS.items() if weights[name]}

    def losses(step: TrainingStep) -> Losses:
        return {name: term(step, config) for name, term in terms.items()}

    return Objective(
        rows=RowPlan(
            forget="guided_distortion" in terms,
            mismatched=config.random_answers if "random_disassociation" in terms else 0,
            retain="preservation_divergence" in terms,
            retain_tokens=config.preservation_tokens,
        ),
        weights={name: float(weights[name]) for name in terms},
        losses=losses,
        needs_reference="preservation_divergence" in terms,
    )


def _guided_distortion(step: TrainingStep, _config: AcquireConfig) -> Tensor:
    rows = step.rows(FORGET)
    return guided_distortion_loss(rows.logits_NV, rows.targets_N, rows.example_N, rows.num_examples)


def _random_disassociation(step: TrainingStep, _config: AcquireConfig) -> Tensor:
    rows = step.rows(MISMATCHED)
    return random_disassociation_loss(rows.logits_NV, rows.targets_N, rows.row_N, rows.example_M, rows.num_examples)


def _preservation_divergence(step: TrainingStep, config: AcquireConfig) -> Tensor:
    rows = step.rows(RETAIN)
    return preservation_divergence_loss(
        step.reference(RETAIN).logits_NV,
        rows.logits_NV,
        rows.example_N,
        rows.num_examples,
        mode=config.preservation_mode,
        cap=config.preservation_cap,
    )


_TERMS = {
    "guided_distortion": _guided_distortion,
    "random_disassociation": _random_disassociation,
    "preservation_divergence": _preservation_divergence,
}
TERMS = tuple(_TERMS)
"""Names of the three modules, as in the log (``loss/<name>``)."""
