"""The objective of stage 1: three modules, each with its weight; a weight of 0 leaves a module out with its cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from sku.acquire.guided_distortion import guided_distortion_loss
from sku.acquire.preservation_divergence import preservation_divergence_loss
from sku.acquire.random_disassociation import random_disassociation_loss
from sku.acquire.reference_behaviours import QUESTION_START, diluted_nll, unbounded_divergence_loss
from sku.config import AcquireConfig, CompatConfig
from sku.data.joint import FORGET, MISMATCHED, RETAIN, RowPlan
from sku.errors import RecipeError
from sku.losses import mean_per_example
from sku.training.objective import Losses, Objective, ScoredRows, TrainingStep
from sku.training.step_limit import check_step_limit

Term = Callable[[TrainingStep, AcquireConfig], Tensor]


def sku_objective(config: AcquireConfig, compat: CompatConfig | None = None) -> Objective:
    """What stage 1 minimises.

    Args:
        config: Weights, K, and how preservation divergence is read; the rest is not used.
        compat: Behaviours of the public code that take the place of ours; None for none.

    Returns:
        The objective, with a term for each module that is on.

    Raises:
        RecipeError: A behaviour of the public code doesn't go with the settings.
    """
    compat = CompatConfig() if compat is None else compat
    _check_mode(config, compat)
    weights = dataclasses.asdict(config.weights)
    terms = {name: term for name, term in (_TERMS | _reference_terms(compat)).items() if weights[name]}
    compares_all = compat.pad_dilution or compat.unbounded_divergence

    def losses(step: TrainingStep) -> Losses:
        return {name: term(step, config) for name, term in terms.items()}

    return Objective(
        rows=RowPlan(
            forget="guided_distortion" in terms,
            mismatched=config.random_answers if "random_disassociation" in terms else 0,
            retain="preservation_divergence" in terms,
            retain_tokens="every" if compares_all else config.preservation_tokens,
            mismatched_from_token=QUESTION_START if compat.question_tokens else None,
            mismatched_shared=compat.shared_draw,
            padded=compat.pad_dilution,
        ),
        weights={name: float(weights[name]) for name in terms},
        losses=losses,
        needs_reference="preservation_divergence" in terms,
        retain_at=config.preservation_at if "preservation_divergence" in terms else 1.0,
        in_whole_passes=compat.epoch_step_limit,
    )


def check_compat(config: AcquireConfig, compat: CompatConfig, max_steps: int) -> None:
    """Refuses behaviours of the public code that don't go with the rest of a recipe, before anything is loaded.

    Args:
        config: Stage 1 of the recipe.
        compat: What is switched on.
        max_steps: Of training, 0 or less where it is not set.

    Raises:
        RecipeError: Which behaviour, and what it needs.
    """
    _check_mode(config, compat)
    if compat.epoch_step_limit:
        check_step_limit(max_steps)


def _check_mode(config: AcquireConfig, compat: CompatConfig) -> None:
    if compat.unbounded_divergence and config.preservation_mode != "divergence":
        raise RecipeError(
            "compat.unbounded_divergence is a divergence, and acquire.preservation_mode is "
            f"{config.preservation_mode}: set acquire.preservation_mode=divergence, or switch "
            "compat.unbounded_divergence off"
        )


def _guided_distortion(step: TrainingStep, _config: AcquireConfig) -> Tensor:
    rows = step.rows(FORGET)
    return guided_distortion_loss(rows.scores_NV, rows.targets_N, rows.example_N, rows.num_examples)


def _random_disassociation(step: TrainingStep, _config: AcquireConfig) -> Tensor:
    rows = step.rows(MISMATCHED)
    return random_disassociation_loss(rows.scores_NV, rows.targets_N, rows.row_N, rows.example_M, rows.num_examples)


def _preservation_divergence(step: TrainingStep, config: AcquireConfig) -> Tensor:
    rows = step.rows(RETAIN)
    return preservation_divergence_loss(
        step.reference(RETAIN).scores_NV,
        rows.scores_NV,
        rows.example_N,
        rows.num_examples,
        mode=config.preservation_mode,
        cap=config.preservation_cap,
    )


def _reference_terms(compat: CompatConfig) -> dict[str, Term]:
    """The terms that behaviours of the public code put in the place of ours."""
    terms: dict[str, Term] = {}
    if compat.pad_dilution:
        terms["guided_distortion"] = lambda step, _config: _diluted(step.rows(FORGET))
        terms["random_disassociation"] = lambda step, _config: _diluted(step.rows(MISMATCHED))
    if compat.unbounded_divergence:
        terms["preservation_divergence"] = _unbounded_divergence
    return terms


def _diluted(rows: ScoredRows) -> Tensor:
    assert rows.positions_to_end_M is not None
    nll_M = diluted_nll(rows.scores_NV, rows.targets_N, rows.row_N, rows.positions_to_end_M)
    return mean_per_example(nll_M, rows.example_M, rows.num_examples)


def _unbounded_divergence(step: TrainingStep, _config: AcquireConfig) -> Tensor:
    rows = step.rows(RETAIN)
    reference = step.reference(RETAIN)
    return unbounded_divergence_loss(reference.logits_NV, rows.logits_NV, rows.example_N, rows.num_examples)


_TERMS: dict[str, Term] = {
    "guided_distortion": _guided_distortion,
    "random_disassociation": _random_disassociation,
    "preservation_divergence": _preservation_divergence,
}
TERMS = tuple(_TERMS)
"""Names of the three modules, as in the log (``loss/<name>``)."""
