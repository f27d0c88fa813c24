"""A random change of the weights as large as a task vector, tensor by tensor: is it the direction or just the size?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from sku.errors import TaskVectorError
from sku.negate.task_vector import TaskVector, unique_weights


def random_direction(base: nn.Module, norms: Mapping[str, float], seed: int) -> TaskVector:
    """Draws a vector of independent normal numbers and gives each tensor the wanted Euclidean norm.

    Args:
        base: The original model, for the shapes.
        norms: Weight name -> norm, as of ``TaskVector.norms``.
        seed: Equal seeds give equal vectors.

    Returns:
        A difference for each named weight.

    Raises:
        TaskVectorError: The base has no weight of such a name.
    """
    weights, tied = unique_weights(base)
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for name in sorted(norms):
        if name not in weights:
            raise TaskVectorError(f"the norms name a weight {name} that the base does not have")
        direction = torch.randn(weights[name].shape, generator=generator)
        deltas[name] = direction * (norms[name] / torch.linalg.vector_norm(direction).clamp_min(1e-30))
    return TaskVector(deltas, {name: owner for name, owner in tied.items() if owner in deltas})
