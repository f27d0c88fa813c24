"""``base - alpha * (bad - base)`` on one block of a tensor, and the sums for the record."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sku.negate.rounding import overflows, round_stochastically
from sku.negate.sums import PIECE, dot_in_cache


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums of squares and products, right to one part in 10,000: see ``dot_in_cache``."""

    base: float = 0.0
    """Of the original weights, squared."""
    difference: float = 0.0
    """Of the task vector, squared."""
    wanted: float = 0.0
    """Of the wanted change, squared."""
    applied: float = 0.0
    """Of the applied change times the wanted one."""

    @staticmethod
    def total(parts: Sequence[Sums]) -> Sums:
        """The sum over several blocks or tensors."""
        return Sums(
            base=sum(part.base for part in parts),
            difference=sum(part.difference for part in parts),
            wanted=sum(part.wanted for part in parts),
            applied=sum(part.applied for part in parts),
        )


class Arithmetic:
    """Buffers of one thread, and what it computes in them."""

    def __init__(self) -> None:
        self._buffers = torch.empty(3, PIECE)

    @classmethod
    def of_thread(cls, local: threading.local) -> Arithmetic:
        """The calling thread's own, made where it has none yet.

        Args:
            local: Holds one for each thread, as ``arithmetic``.
        """
        if not hasattr(local, "arithmetic"):
            local.arithmetic = cls()
        arithmetic = local.arithmetic
        assert isinstance(arithmetic, cls)
        return arithmetic

    def subtract(
        self, base: Tensor, other: Tensor, result: Tensor, alpha: float, *, is_difference: bool, draws: Tensor | None
    ) -> Sums:
        """Subtracts in float32 and rounds once, as ``sku.negate.run.subtract_into`` does.

        Args:
            base: Original weights, flat, of any floating type.
            other: The bad model's, or the difference itself, of the same length.
            result: Takes the result in its own type.
            alpha: 0 copies ``base``.
            is_difference: Whether ``other`` is the difference.
            draws: Uniform numbers for stochastic rounding; None rounds to nearest.

        Returns:
            The sums. One of them is not finite where a difference or a result is not.
        """
        return Sums.total(
            [
                self._piece(
                    base[at : at + PIECE],
                    other[at : at + PIECE],
                    result[at : at + PIECE],
                    alpha,
                    is_difference=is_difference,
                    draws=None if draws is None else draws[at : at + PIECE],
                )
                for at in range(0, base.numel(), PIECE)
            ]
        )

    def _piece(
        self, base: Tensor, other: Tensor, result: Tensor, alpha: float, *, is_difference: bool, draws: Tensor | None
    ) -> Sums:
        count = base.numel()
        weight, change, after = self._buffers[:, :count]
        weight.copy_(base)
        change.copy_(other)
        if not is_difference:
            change.sub_(weight)
        base_square = dot_in_cache(weight, weight)
        difference_square = dot_in_cache(change, change)
        if alpha == 0:
            _round(base, result, draws)  # -0.0 - 0 * x would already turn a bit.
            broken = math.inf if overflows(base, result) else 0.0
            return Sums(base=base_square, difference=difference_square, applied=broken)
        change.mul_(-alpha)
        torch.add(weight, change, out=after)
        _round(after, result, draws)
        after.copy_(result).sub_(weight)
        return Sums(
            base=base_square,
            difference=difference_square,
            wanted=difference_square * alpha * alpha,
            applied=dot_in_cache(after, change),
        )


def convert(base: Tensor, result: Tensor, draws: Tensor | None) -> bool:
    """Gives weights that stay as they are another type.

    Args:
        base: Flat.
        result: Takes the result in its own type.
        draws: As in ``Arithmetic.subtract``.

    Returns:
        Whether all that is finite stayed so.
    """
    for at in range(0, base.numel(), PIECE):
        piece = slice(at, at + PIECE)
        _round(base[piece], result[piece], None if draws is None else draws[piece])
        if overflows(base[piece], result[piece]):
            return False
    return True


def _round(values: Tensor, result: Tensor, draws: Tensor | None) -> None:
    if draws is None or values.dtype == result.dtype:
        result.copy_(values)
    else:
        result.copy_(round_stochastically(values.float(), result.dtype, draws))
