"""Sums over large float32 tensors in float64, without a float64 copy of the whole."""

from __future__ import annotations

from torch import Tensor

PIECE = 2**16
"""Elements that are computed together: few enough that all intermediate results stay in a core's cache."""


def dot_float64(first: Tensor, second: Tensor) -> float:
    """The sum of all products of two tensors of one shape, each product and the sum in float64."""
    pairs = zip(first.reshape(-1).split(PIECE), second.reshape(-1).split(PIECE), strict=True)
    return sum(float(one.double().dot(other.double())) for one, other in pairs)
