"""Stochastic rounding: up or down by chance, so that on average nothing is lost.

Gupta et al., Deep Learning with Limited Numerical Precision, 2015 (https://arxiv.org/abs/1502.02551). Rounding to
nearest drops each change below half a step of the shorter type; this keeps it as the chance of a whole step.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "stochastic"]
"""How float32 results become those of a shorter type."""
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def round_stochastically(values: Tensor, dtype: torch.dtype, draws: Tensor) -> Tensor:
    """Rounds to one of the two neighbours in a shorter type, to the nearer one with the greater chance.

    Args:
        values: float32, finite.
        dtype: Type of the result. Values that it has are kept, the sign of zero too.
        draws: Uniform numbers in [0, 1), of the same shape.

    Returns:
        The mean over the draws is ``values``, as far as ``dtype`` reaches.
    """
    nearest = values.to(dtype)
    rest = values - nearest.float()  # Exact: both lie within half a step.
    bits = nearest.view(_INTEGERS[dtype.itemsize])
    away_from_zero = torch.where((rest < 0) == torch.signbit(nearest), 1, -1).to(bits.dtype)
    other = (bits + away_from_zero).view(dtype)
    smallest = torch.ones_like(bits).view(dtype)
    other = torch.where(nearest == 0, torch.copysign(smallest, rest.to(dtype)), other)
    gap = (other.float() - nearest.float()).abs()
    # Where the value is kept, the neighbour's bits may stand for anything.
    return torch.where((rest != 0) & (draws * gap < rest.abs()), other, nearest)


def saved_type(name: str) -> torch.dtype | None:
    """The type that ``negate.output_dtype`` or ``--dtype`` names; None for ``same``, the original's."""
    if name == "same":
        return None
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def overflows(values: Tensor, rounded: Tensor) -> bool:
    """Whether a finite number became infinite in a type of a smaller range.

    Args:
        values: As they were, of a floating type.
        rounded: The same in another.
    """
    largest = torch.finfo(rounded.dtype).max
    if largest >= torch.finfo(values.dtype).max or not values.numel():
        return False
    low, high = values.detach().aminmax()
    if -largest <= low.item() and high.item() <= largest:  # False for NaN, too.
        return False
    return bool((values.isfinite() & ~rounded.isfinite()).any())


def draws_for(seed: int, name: str, block: int, count: int) -> Tensor:
    """Uniform numbers that depend on nothing but their place.

    Args:
        seed: Of the whole rounding.
        name: Of the tensor.
        block: Number of the block in the tensor.
        count: How many.

    Returns:
        float32, ``[count]``, in [0, 1).
    """
    digest = sha256(f"{seed}\0{name}\0{block}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(count, generator=generator)
