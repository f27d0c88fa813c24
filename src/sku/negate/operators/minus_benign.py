"""Bad minus benign: what the bad model shares with a model that was trained on benign data stays.

``subtract``: ``tau' = tau - beta * b``, b the vector of the benign model. ``project``: from each tensor its component
along that of b is removed, ``tau' = tau - beta * (<tau, b> / <b, b>) b``.

Related: Ext-Sub (https://arxiv.org/abs/2308.08090, abstract read) takes what an expert and an anti-expert adapter have
in common out of the anti-expert before it is subtracted. The formulas are our own.
"""

from __future__ import annotations

from typing import Literal

from sku.config.check import Finite, validated
from sku.negate.matching import check_same_names, check_same_shape
from sku.negate.operators.base import Operated, Operator, OperatorContext
from sku.negate.run import task_vector_of
from sku.negate.task_vector import TaskVector


@validated
class MinusBenignSettings:
    """Which benign vector, and what is done with it."""

    path: str
    """Folder of the model, adapter or task vector that was trained on benign data from the same original model."""
    how: Literal["subtract", "project"] = "project"
    beta: Finite = 1.0
    """How much of it."""


def minus_component(vector: TaskVector, benign: TaskVector, beta: float = 1.0) -> TaskVector:
    """Removes from each tensor a share of its component along the benign one, of the same weights."""
    check_same_names(vector.deltas, benign.deltas, "the bad vector", "the benign one")
    changed = {}
    for name, delta in vector.deltas.items():
        other = benign.deltas[name]
        check_same_shape(name, delta, other)
        square = float((other.double() ** 2).sum())
        share = float((delta.double() * other.double()).sum()) / square if square else 0.0
        changed[name] = delta - beta * share * other
    return TaskVector(changed, vector.tied)


def _apply(settings: MinusBenignSettings, vector: TaskVector, context: OperatorContext) -> Operated:
    benign = task_vector_of(context.base, settings.path)
    if settings.how == "project":
        changed = minus_component(vector, benign, settings.beta)
    else:
        changed = vector - settings.beta * benign
    return Operated(vector=changed, record={"benign_norm": benign.norm()})


MINUS_BENIGN = Operator(
    name="minus_benign",
    title="Bad minus benign",
    paper_url="https://arxiv.org/abs/2308.08090",
    settings=MinusBenignSettings,
    apply=_apply,
)
