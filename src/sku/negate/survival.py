"""What is left of a change of the weights once they are rounded to another format, tensor by tensor.

Rounding can undo unlearning (arXiv 2410.16454): where the change is smaller than a step of the format, the unlearned
model rounds to what the original rounds to. With Q the rounding, ``applied = Q(theta_o - alpha tau) - Q(theta_o)`` is
compared with ``wanted = -alpha tau``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sku.negate.matching import check_same_shape
from sku.negate.operators.base import linear_weights, turned_weights
from sku.negate.task_vector import TaskVector, unique_weights
from sku.quantization import int8_rounded, nf4_rounded

Format = Literal["bf16", "fp16", "int8", "nf4-sim"]
FORMATS: tuple[Format, ...] = ("bf16", "fp16", "int8", "nf4-sim")
_CASTS: dict[Format, Callable[[Tensor], Tensor]] = {
    "bf16": lambda weight: weight.to(torch.bfloat16).float(),
    "fp16": lambda weight: weight.to(torch.float16).float(),
    "int8": int8_rounded,
    "nf4-sim": nf4_rounded,
}
_LAYERS_ONLY: tuple[Format, ...] = ("int8", "nf4-sim")


@dataclass(frozen=True, kw_only=True)
class Survival:
    """Of one tensor, or of several together, in one format."""

    entries: int
    """Entries whose change was wanted."""
    changed: float
    """Share of these that differ between the two rounded models. In 8 and 4 bits they also do where nothing but the
    scale of their channel or block moved, so that ``projection`` says more."""
    projection: float
    """``<applied, wanted> / <wanted, wanted>``: 1 where nothing was lost, 0 where nothing is left."""


def delta_survival(
    base: PreTrainedModel, vector: TaskVector, alpha: float, formats: Sequence[Format] = FORMATS
) -> dict[str, Any]:
    """Measures each format on each changed tensor. Nothing is written into the models.

    Args:
        base: The original model.
        vector: What is subtracted.
        alpha: How much of it; not 0.
        formats: ``int8`` (one scale an output channel) and ``nf4-sim`` (blocks of 64) round linear layers alone.

    Returns:
        Format -> ``entries``, ``changed`` and ``projection`` over all its tensors; ``tensors``, the projection by
        name; ``not_rounded``, the number of changed tensors that the format leaves as they are.

    Raises:
        TaskVectorError: The vector doesn't fit the base.
    """
    weights, turned, layers = unique_weights(base)[0], turned_weights(base), linear_weights(base)
    found: dict[str, Any] = {}
    for form in formats:
        names = [name for name in vector.deltas if form not in _LAYERS_ONLY or name in layers]
        sums = {name: _sums(name, weights[name], vector.deltas[name], alpha, form, turned) for name in names}
        together = [sum(values) for values in zip(*sums.values(), strict=True)] or [0, 0, 0.0, 0.0]
        found[form] = {
            **vars(_survival(*together)),
            "tensors": {name: _survival(*values).projection for name, values in sums.items()},
            "not_rounded": len(vector.deltas) - len(names),
        }
    return found


def _sums(
    name: str, weight: Tensor, delta: Tensor, alpha: float, form: Format, turned: set[str]
) -> tuple[int, int, float, float]:
    """Entries wanted, entries changed, ``<applied, wanted>`` and ``<wanted, wanted>``."""
    check_same_shape(name, weight, delta)
    original, wanted = weight.detach().cpu().float(), -alpha * delta
    if name in turned:
        original, wanted = original.T.contiguous(), wanted.T.contiguous()
    cast = _CASTS[form]
    applied = cast(original + wanted) - cast(original)
    asked = wanted != 0
    return (
        int(asked.sum()),
        int((asked & (applied != 0)).sum()),
        float((applied.double() * wanted.double()).sum()),
        float((wanted.double() ** 2).sum()),
    )


def _survival(entries: float, changed: float, product: float, square: float) -> Survival:
    return Survival(
        entries=int(entries),
        changed=changed / entries if entries else 1.0,
        projection=product / square if square else 1.0,
    )
