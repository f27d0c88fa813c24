"""The objective of stage 1: three modules, each with its weight; a weight of 0 leaves a module out with its cost."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from sku.acquire.guided_distortion import guided_distortion_loss
from sku.acquire.preservation_divergence import preservation_divergence_loss, targeted_divergence_loss
from sku.acquire.random_disassociation import random_disassociation_loss
from sku.config.stages import ModulesConfig, Twin, WeightsConfig
from sku.data.examples import RowType
from sku.errors import RecipeError
from sku.losses import mean_per_example
from sku.training.objective import Objective, ScoredRows, Term, TrainingStep


def sku_objective(config: ModulesConfig, *, twin: Twin = "bad") -> Objective:
    """What stage 1 minimises.

    Args:
        config: Weights, K, how preservation divergence is read, and what the good twin sees.
        twin: Which model it is for: ``good`` learns refusals of the same harmful prompts in the place of harmful
            answers, without random disassociation, and always keeps its normal answers (``retention``).

    Returns:
        The objective, with a term for each module that is on.

    Raises:
        RecipeError: A good twin would learn no refusal.
    """
    weights, good = config.weights, twin == "good"
    if good and not weights.guided_distortion:
        raise RecipeError("the good twin learns its refusals by guided distortion, whose weight is 0: give it one")
    if good:
        config = dataclasses.replace(config, preservation_mode="retention")
    targeted = config.preservation_mode == "targeted"
    refusals = {"safe": "all", "depth_share": config.depth_share, "depth_tokens": config.depth_tokens}
    normal = {
        "retain": config.normal_per_harmful,
        "retain_refused": targeted,
        "retain_tokens": "answer" if targeted else config.preservation_tokens,
    }
    objective = Objective.of(
        {
            "guided_distortion": Term(
                weight=weights.guided_distortion,
                loss=lambda step: _guided_distortion(step.rows(RowType.SAFE if good else RowType.FORGET)),
                rows=refusals if good else {"forget": True},
            ),
            "random_disassociation": Term(
                weight=0.0 if good else weights.random_disassociation,
                loss=random_disassociation,
                rows={"mismatched": config.random_answers},
            ),
            "preservation_divergence": Term(
                weight=weights.preservation_divergence,
                loss=lambda step: _preservation_divergence(step, config),
                rows=normal,
                reference=not targeted,
            ),
        }
    )
    # Whichever terms are on, their rows are of the same prompts.
    return dataclasses.replace(objective, rows=dataclasses.replace(objective.rows, framed_share=config.framed_share))


def _guided_distortion(rows: ScoredRows) -> Tensor:
    return guided_distortion_loss(rows.scores_NV, rows.targets_N, rows.example_N, rows.num_examples)


def random_disassociation(step: TrainingStep) -> Tensor:
    """``random_disassociation_loss`` of the mismatched rows of a step."""
    rows = step.rows(RowType.MISMATCHED)
    return random_disassociation_loss(rows.scores_NV, rows.targets_N, rows.row_N, rows.example_M, rows.num_examples)


def _preservation_divergence(step: TrainingStep, config: ModulesConfig) -> Tensor:
    rows = step.rows(RowType.RETAIN)
    if config.preservation_mode == "targeted":
        losses_M = targeted_divergence_loss(rows.scores_NV, rows.targets_N, rows.row_N, len(rows.example_M))
    else:
        losses_M = preservation_divergence_loss(
            step.reference(RowType.RETAIN).scores_NV,
            rows.scores_NV,
            rows.row_N,
            len(rows.example_M),
            mode=config.preservation_mode,
            cap=config.preservation_cap,
        )
    return mean_per_example(losses_M, rows.example_M, rows.num_examples)


TERMS = tuple(item.name for item in dataclasses.fields(WeightsConfig))
"""Names of the three modules, as in the log (``loss/<name>``)."""
