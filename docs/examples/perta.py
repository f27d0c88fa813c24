"""PerTA: every single parameter gets its own factor, by how much it matters for forgetting and for keeping.

    sku run my.yaml --set 'negate.operators=[{docs/examples/perta.py: {importance: fisher}}]'

Paper: https://arxiv.org/abs/2601.22030 (per-parameter task arithmetic). Established from its abstract and from public
notes on it: the task vector is rescaled entry by entry; the factors weigh the importance for the forget data against
that for the retain data; both are measured at the original weights, by gradients (PerTA-grad) or by mean squares of
gradients, the diagonal of the Fisher information (PerTA-fisher); a share of the data is enough. How the paper
normalises and bounds the factors could not be established. Our reading:

    ``w = f / (f + r)``, between 0 and 1, and ``tau' = w * tau``,

with ``f = |mean gradient|`` on harmful answers and r that on normal answers for ``grad``, and the mean over examples
of squared gradients for ``fisher``. An entry that matters for neither keeps half, as one that matters for both alike.

It changed no vector by more than noise: docs/stage2.md has the figures, and that is why it is an example.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sku.data.tokens import TokenizedExample
from sku.errors import RecipeError
from sku.negate.operators.base import Operated, Operator, OperatorContext
from sku.negate.operators.texts import drawn, mean_gradient
from sku.negate.task_vector import TaskVector


@dataclass(frozen=True, kw_only=True)
class PertaSettings:
    """How importance is measured."""

    importance: Literal["grad", "fisher"] = "grad"
    """``fisher`` takes one backward pass an example."""
    examples: int = 64
    """Most examples of each kind, drawn by the seed."""

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise RecipeError(f"examples is {self.examples}; it must be 1 or more")


def importance_of(
    settings: PertaSettings, names: Sequence[str], examples: Sequence[TokenizedExample], context: OperatorContext
) -> dict[str, Tensor]:
    """How much each entry matters for the answers of some examples: 0 or more, float32 on the CPU, by weight."""
    if settings.importance == "grad":
        found = mean_gradient(context.base, names, examples, context.batch_size)
        return {name: gradient.abs() for name, gradient in found.items()}
    squares: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    for example in examples:
        for name, gradient in mean_gradient(context.base, names, [example], 1).items():
            squares[name] = squares[name] + gradient.square()
    return {name: total / len(examples) for name, total in squares.items()}


def relative_importance(forget: Tensor, retain: Tensor) -> Tensor:
    """``f / (f + r)``, one half where both are 0."""
    total = forget + retain
    return torch.where(total > 0, forget / torch.where(total > 0, total, torch.ones_like(total)), 0.5)


def apply(settings: PertaSettings, vector: TaskVector, context: OperatorContext) -> Operated:
    """Scales every entry of the vector."""
    names = list(vector.deltas)
    forget, retain = (
        importance_of(settings, names, drawn(examples, settings.examples, context.seed), context)
        for examples in (context.harmful, context.normal)
    )
    factors = {name: relative_importance(forget[name], retain[name]) for name in names}
    changed = TaskVector({name: delta * factors[name] for name, delta in vector.deltas.items()}, vector.tied)
    entries = sum(factor.numel() for factor in factors.values())
    mean = sum(float(factor.double().sum()) for factor in factors.values()) / entries
    return Operated(vector=changed, row_maps=None, record={"mean_factor": mean})


PERTA = Operator(
    name="perta",
    title="PerTA",
    paper_url="https://arxiv.org/abs/2601.22030",
    settings=PertaSettings,
    apply=apply,
    needs=("normal", "harmful"),
)
