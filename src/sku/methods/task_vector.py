"""Task vector: fine-tuning on the harmful pairs, then subtraction of the difference it made.

The loss is ``guided_distortion_loss``, the first of SKU's three modules, so this is SKU with that module alone. Paper:
arXiv 2212.04089 (Ilharco et al., "forgetting via negation"); a baseline of arXiv 2402.10058 (SKU).
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from sku.acquire.guided_distortion import guided_distortion_loss
from sku.data.joint import FORGET, RowPlan
from sku.methods.base import Method
from sku.training.objective import Losses, Objective, TrainingStep


@dataclass(frozen=True, kw_only=True)
class TaskVectorSettings:
    """The task vector has no settings of its own: one term, whose scale the learning rate sets."""


def _objective(_settings: TaskVectorSettings, _model: PreTrainedModel) -> Objective:
    def losses(step: TrainingStep) -> Losses:
        rows = step.rows(FORGET)
        return {
            "guided_distortion": guided_distortion_loss(
                rows.scores_NV, rows.targets_N, rows.example_N, rows.num_examples
            )
        }

    return Objective(rows=RowPlan(forget=True), weights={"guided_distortion": 1.0}, losses=losses)


TASK_VECTOR = Method(
    name="task_vector",
    title="Task vector",
    paper_url="https://arxiv.org/abs/2212.04089",
    settings=TaskVectorSettings,
    objective=_objective,
    negates=True,
    hazardous=True,
)
