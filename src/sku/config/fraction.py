"""The check of a share, for all sections."""

from __future__ import annotations

from sku.errors import RecipeError


def check_fraction(key: str, value: float) -> None:
    """Refuses a share that leaves nothing on one of its sides.

    Raises:
        RecipeError: It does not lie between 0 and 1.
    """
    if not 0 < value < 1:
        raise RecipeError(f"{key} is {value}; it must lie between 0 and 1")
