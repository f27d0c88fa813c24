"""Random direction: numbers drawn at random in place of the task vector, as long as it in every weight.

    sku run my.yaml --set negate.transform=docs/examples/random_direction.py

It answers whether the direction unlearns, or any change of that size.
"""

from __future__ import annotations

from sku import TaskVector, TransformContext


def transform(vector: TaskVector, context: TransformContext) -> TaskVector:
    """Keeps the norm of every difference and nothing else of it."""
    return TaskVector.random(context.base, vector.norms(), context.seed)
