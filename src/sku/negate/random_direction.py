"""The control ``random_direction``, as ``negate.transform`` takes it: any change of SKU's size, in no direction.

Does the direction unlearn, or any change of that size?
"""

from __future__ import annotations

import torch

from sku.negate.task_vector import TaskVector, TransformContext


def transform(vector: TaskVector, context: TransformContext) -> TaskVector:
    """Normal numbers, as long as SKU's change in every tensor; added, as such a direction has no sign of its own."""
    generator = torch.Generator().manual_seed(context.seed)
    deltas = {}
    for name, norm in sorted(vector.norms().items()):
        direction = torch.randn(vector.deltas[name].shape, generator=generator)
        deltas[name] = direction * (-norm / torch.linalg.vector_norm(direction).clamp_min(1e-30))
    return TaskVector(deltas, vector.tied)
