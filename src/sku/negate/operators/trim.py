"""Trimming: only the largest entries of the vector are subtracted.

``D'_ij = D_ij where |D_ij| >= t, else 0``, with t the k-th largest magnitude among the entries of all changed weights,
``k = keep * their number``.

Safety Arithmetic (https://arxiv.org/abs/2406.11801) trims a harmful vector to its top 10 % of parameters by magnitude
before it is subtracted; TIES (https://arxiv.org/abs/2306.01708) does so before vectors are merged. As in the public
code of both, which trims one flat vector, the entries of all weights compete: a weight that stage 1 hardly changed
keeps hardly anything. PEFT's merging trims each tensor to the same share, which would keep a tenth of it as well.

t is exact, found by counting and not by sorting, in memory that doesn't grow with the model. Entries that are as large
as the smallest kept one are all kept, so that the result depends on no order; where many are equal (differences of
bfloat16 weights are), ``kept`` in the record is more than k.

An adapter's product ``B A`` has no factors after trimming: what is subtracted is dense, and no adapter follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sku.config.check import Fraction, validated
from sku.negate import arithmetic
from sku.negate.operators.base import Operated, Operator, OperatorContext
from sku.negate.task_vector import TaskVector

_LOW_BITS = 16
_SIGNLESS = 0x7FFFFFFF


@validated
class TrimSettings:
    """How much is kept."""

    keep: Fraction = 0.1
    """Share of all entries, from the largest."""


def kth_largest_magnitude(tensors: Mapping[str, Tensor], k: int) -> float:
    """The k-th largest magnitude of all entries together, exactly.

    Finite float32 numbers without their sign are ordered as the integers of the same bits. One pass over blocks counts
    the upper 15 bits, which says in which of their values the k-th entry lies; a second one counts the other 16 there.

    Args:
        tensors: Name -> float32, finite, of any shape.
        k: From 1 to the number of entries.

    Returns:
        The magnitude.
    """
    upper = torch.zeros(1 << (31 - _LOW_BITS), dtype=torch.int64)
    for bits in _magnitude_bits(tensors):
        upper += torch.bincount(bits >> _LOW_BITS, minlength=len(upper))
    bucket, left = _descend(upper, k)
    lower = torch.zeros(1 << _LOW_BITS, dtype=torch.int64)
    for bits in _magnitude_bits(tensors):
        inside = bits[(bits >> _LOW_BITS) == bucket] & ((1 << _LOW_BITS) - 1)
        lower += torch.bincount(inside, minlength=len(lower))
    rest, _ = _descend(lower, left)
    return float(torch.tensor((bucket << _LOW_BITS) | rest, dtype=torch.int32).view(torch.float32))


def _magnitude_bits(tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    for tensor in tensors.values():
        for block in tensor.contiguous().view(-1).split(arithmetic.BLOCK_ELEMENTS):
            yield block.view(torch.int32) & _SIGNLESS


def _descend(counts: Tensor, k: int) -> tuple[int, int]:
    """The value of the k-th largest, from the number of entries of each value, and its place among those of it."""
    at_least = counts.flip(0).cumsum(0)
    place = int((at_least < k).sum())
    return len(counts) - 1 - place, k - (int(at_least[place - 1]) if place else 0)


def _apply(settings: TrimSettings, vector: TaskVector, _context: OperatorContext) -> Operated:
    entries = sum(delta.numel() for delta in vector.deltas.values())
    smallest = kth_largest_magnitude(vector.deltas, max(1, round(settings.keep * entries)))
    changed = TaskVector(
        {name: torch.where(delta.abs() >= smallest, delta, 0.0) for name, delta in vector.deltas.items()}, vector.tied
    )
    kept = sum(int(delta.count_nonzero()) for delta in changed.deltas.values())
    return Operated(vector=changed, record={"entries": entries, "kept": kept, "smallest": smallest})


TRIM = Operator(
    name="trim",
    title="Trimming by magnitude",
    paper_url="https://arxiv.org/abs/2406.11801",
    settings=TrimSettings,
    apply=_apply,
)
