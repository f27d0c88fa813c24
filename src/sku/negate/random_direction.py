"""The control ``random_direction``, as ``negate.transform`` takes it: any change of SKU's size, in no direction."""

from __future__ import annotations

from sku.negate.task_vector import TaskVector, TransformContext


def transform(vector: TaskVector, context: TransformContext) -> TaskVector:
    """Normal numbers, as long as SKU's change in every tensor; added, as such a direction has no sign of its own."""
    return -TaskVector.random(context.base, vector.norms(), context.seed)
