"""NegMerge: of several bad vectors, only the entries whose sign is the same in all are subtracted.

    sku run my.yaml --set 'negate.operators=[{docs/examples/neg_merge.py: {paths: [other_bad, third_bad]}}]'

Paper: https://arxiv.org/abs/2410.05583. The vectors come from runs of stage 1 that differ in their settings or seed.
Entries on whose sign all agree are averaged; the others, and those that one vector leaves at 0, become 0.

It averaged good vectors with bad ones: docs/stage2.md has the figures, and that is why it is an example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sku.errors import RecipeError, TaskVectorError
from sku.negate.matching import check_same_names, check_same_shape
from sku.negate.operators.base import Operated, Operator, OperatorContext
from sku.negate.run import task_vector_of
from sku.negate.task_vector import TaskVector


@dataclass(frozen=True, kw_only=True)
class NegMergeSettings:
    """What is merged with the recipe's own vector."""

    paths: tuple[str, ...]
    """Folders of the other bad models, adapters or task vectors of the same original model."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise RecipeError("paths is empty; name at least one other bad model, adapter or task vector")


def sign_merge(vectors: Sequence[TaskVector]) -> TaskVector:
    """Averages the entries on whose sign all vectors of the same weights agree, and drops the others."""
    first, *others = vectors
    for other in others:
        check_same_names(first.deltas, other.deltas, "the first task vector", "another")
    merged = {}
    for name, delta in first.deltas.items():
        for other in others:
            check_same_shape(name, delta, other.deltas[name])
        signs = [torch.sign(vector.deltas[name]) for vector in vectors]
        agreed = (torch.stack(signs).sum(0).abs() == len(vectors)).float()
        merged[name] = agreed * sum(vector.deltas[name] / len(vectors) for vector in vectors)
    vector = TaskVector(merged, first.tied)
    if vector.norm() == 0:
        raise TaskVectorError(f"the {len(vectors)} task vectors agree on the sign of no entry: nothing is left")
    return vector


def apply(settings: NegMergeSettings, vector: TaskVector, context: OperatorContext) -> Operated:
    """Merges the vector with the saved ones."""
    merged = sign_merge([vector, *(task_vector_of(context.base, path) for path in settings.paths)])
    entries = sum(delta.numel() for delta in merged.deltas.values())
    kept = sum(int((delta != 0).sum()) for delta in merged.deltas.values())
    record = {"vectors": 1 + len(settings.paths), "share_agreed": kept / entries}
    return Operated(vector=merged, row_maps=None, record=record)


NEG_MERGE = Operator(
    name="neg_merge",
    title="NegMerge",
    paper_url="https://arxiv.org/abs/2410.05583",
    settings=NegMergeSettings,
    apply=apply,
)
