"""The objective of stage 1: three modules, each with its weight; a weight of 0 leaves a module out with its cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from sku.acquire.guided_distortion import guided_distortion_loss
from sku.acquire.preservation_divergence import preservation_divergence_loss, targeted_divergence_loss
from sku.acquire.random_disassociation import random_disassociation_loss
from sku.acquire.reference_behaviours import QUESTION_START, diluted_nll, unbounded_divergence_loss
from sku.config import AcquireConfig, CompatConfig, Twin
from sku.data.joint import FORGET, MISMATCHED, RETAIN, SAFE, RowPlan
from sku.errors import RecipeError
from sku.losses import mean_per_example
from sku.training.objective import Losses, Objective, ScoredRows, TrainingStep
from sku.training.step_limit import check_step_limit

Term = Callable[[TrainingStep, AcquireConfig], Tensor]


def sku_objective(config: AcquireConfig, compat: CompatConfig | None = None, *, twin: Twin = "bad") -> Objective:
    """What stage 1 minimises.

    Args:
        config: Weights, K, how preservation divergence is read, and what the good twin sees; the rest is not used.
        compat: Behaviours of the public code that take the place of ours; None for none.
        twin: Which model it is for: ``good`` learns refusals of the same harmful prompts in the place of harmful
            answers, without random disassociation, and always keeps its normal answers (``retention``).

    Returns:
        The objective, with a term for each module that is on.

    Raises:
        RecipeError: A behaviour of the public code doesn't go with the settings.
    """
    compat = CompatConfig() if compat is None else compat
    _check_mode(config, compat)
    if twin == "good":
        return _good_objective(config)
    weights = dataclasses.asdict(config.weights)
    terms = {name: term for name, term in (_TERMS | _reference_terms(compat)).items() if weights[name]}
    targeted = config.preservation_mode == "targeted"
    compares_all = compat.pad_dilution or compat.unbounded_divergence

    def losses(step: TrainingStep) -> Losses:
        return {name: term(step, config) for name, term in terms.items()}

    return Objective(
        rows=RowPlan(
            forget="guided_distortion" in terms,
            mismatched=config.random_answers if "random_disassociation" in terms else 0,
            retain=config.normal_per_harmful if "preservation_divergence" in terms else 0,
            retain_refused=targeted and "preservation_divergence" in terms,
            retain_tokens="every" if compares_all else "answer" if targeted else config.preservation_tokens,
            mismatched_from_token=QUESTION_START if compat.question_tokens else None,
            mismatched_shared=compat.shared_draw,
            padded=compat.pad_dilution,
        ),
        weights={name: float(weights[name]) for name in terms},
        losses=losses,
        needs_reference="preservation_divergence" in terms and not targeted,
        retain_at=config.preservation_at if "preservation_divergence" in terms else 1.0,
        in_whole_passes=compat.epoch_step_limit,
    )


def _good_objective(config: AcquireConfig) -> Objective:
    kept = config.weights.preservation_divergence > 0
    weights = {"guided_distortion": config.weights.guided_distortion}
    if kept:
        weights["preservation_divergence"] = config.weights.preservation_divergence
    retention = dataclasses.replace(config, preservation_mode="retention")

    def losses(step: TrainingStep) -> Losses:
        rows = step.rows(SAFE)
        refusals = guided_distortion_loss(rows.scores_NV, rows.targets_N, rows.example_N, rows.num_examples)
        terms = {"guided_distortion": refusals}
        if kept:
            terms["preservation_divergence"] = _preservation_divergence(step, retention)
        return terms

    return Objective(
        rows=RowPlan(
            safe="all",
            depth_share=config.depth_share,
            depth_tokens=config.depth_tokens,
            retain=config.normal_per_harmful if kept else 0,
            retain_tokens=config.preservation_tokens,
        ),
        weights=weights,
        losses=losses,
        needs_reference=kept,
        # It is added where the bad model is subtracted.
        retain_at=abs(config.preservation_at) if kept else 1.0,
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
    if config.preservation_mode == "targeted" and compat.pad_dilution:
        raise RecipeError(
            "compat.pad_dilution compares padding, and acquire.preservation_mode targeted learns refusals alone: "
            "switch one of them off"
        )
    if config.twin == "good" and compat != CompatConfig(row_split=compat.row_split):
        raise RecipeError("compat trains as the public code does, which has no good twin: set acquire.twin=none")


def _guided_distortion(step: TrainingStep, _config: AcquireConfig) -> Tensor:
    rows = step.rows(FORGET)
    return guided_distortion_loss(rows.scores_NV, rows.targets_N, rows.example_N, rows.num_examples)


def _random_disassociation(step: TrainingStep, _config: AcquireConfig) -> Tensor:
    rows = step.rows(MISMATCHED)
    return random_disassociation_loss(rows.scores_NV, rows.targets_N, rows.row_N, rows.example_M, rows.num_examples)


def _preservation_divergence(step: TrainingStep, config: AcquireConfig) -> Tensor:
    rows = step.rows(RETAIN)
    if config.preservation_mode == "targeted":
        losses_M = targeted_divergence_loss(rows.scores_NV, rows.targets_N, rows.row_N, len(rows.example_M))
    else:
        losses_M = preservation_divergence_loss(
            step.reference(RETAIN).scores_NV,
            rows.scores_NV,
            rows.row_N,
            len(rows.example_M),
            mode=config.preservation_mode,
            cap=config.preservation_cap,
        )
    return mean_per_example(losses_M, rows.example_M, rows.num_examples)


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
