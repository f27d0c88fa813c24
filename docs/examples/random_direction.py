"""Random direction: numbers drawn at random in place of the task vector, as long as it in every weight.

    sku run my.yaml --set 'negate.operators=[docs/examples/random_direction.py: {}]'

It answers whether the direction unlearns, or any change of that size: ``sku compare`` has the same control in its
tables. In a table of ``sku results`` the row is named after both, as ``sku+random_direction``.
"""

from __future__ import annotations

from dataclasses import dataclass

from sku import Operated, Operator, OperatorContext, TaskVector


@dataclass(frozen=True, kw_only=True)
class RandomDirectionSettings:
    """None: the seed is the run's."""


def apply(_settings: RandomDirectionSettings, vector: TaskVector, context: OperatorContext) -> Operated:
    """Keeps the norm of every difference and nothing else of it."""
    return Operated(vector=TaskVector.random(context.base, vector.norms(), context.seed), record={})


RANDOM_DIRECTION = Operator(
    name="random_direction",
    title="Random direction",
    paper_url="https://arxiv.org/abs/2212.04089",
    settings=RandomDirectionSettings,
    apply=apply,
)
