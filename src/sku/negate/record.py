"""The account of a subtraction."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

Rounding = Literal["nearest", "stochastic"]
"""How float32 results become those of a shorter type."""


@dataclass(frozen=True, kw_only=True)
class Negation:
    """What a subtraction did, for the manifest."""

    alpha: float
    task_vector_norm: float
    base_norm: float
    """Euclidean norm of the original weights that were changed."""
    changed_weights: int
    """Number of tensors, tied ones once."""
    dtype: str
    """Type of the result."""
    survival: float
    """Projection of the applied change on the wanted one: 1 when rounding to ``dtype`` lost nothing."""

    def to_dict(self) -> dict[str, float | int | str]:
        """As plain data."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class StreamedNegation(Negation):
    """The same of a subtraction from file to file."""

    rounding: Rounding = "nearest"
    rounding_seed: int = 0
    """Of the stochastic rounding; the nearest one draws nothing."""
