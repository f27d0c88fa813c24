"""Sums over large float32 tensors in float64, without a float64 copy of the whole."""

from __future__ import annotations

from torch import Tensor

PIECE = 2**16
"""Elements that are computed together: few enough that all intermediate results stay in a core's cache."""


_SERIAL_PIECE = 2**15
"""The most that torch computes without waking its other threads, whose meeting costs more than such a piece."""


def dot_float64(first: Tensor, second: Tensor) -> float:
    """The sum of all products of two tensors of one shape, each product and the sum in float64."""
    pairs = zip(first.reshape(-1).split(_SERIAL_PIECE), second.reshape(-1).split(_SERIAL_PIECE), strict=True)
    # Not ``dot``: its library wakes all threads even for this little.
    return sum(float(one.double().mul_(other.double()).sum()) for one, other in pairs)
