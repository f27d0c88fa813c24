"""The check that seeds of a recipe share."""

from __future__ import annotations

from sku.errors import RecipeError

_LARGEST = 2**32 - 1
"""NumPy takes no larger one."""


def check_seed(key: str, seed: int | None) -> None:
    """Refuses a seed that some generator of random numbers would refuse later.

    Args:
        key: Of the recipe, for the message.
        seed: None where another one is taken.

    Raises:
        RecipeError: It is below 0 or above 2**32 - 1.
    """
    if seed is not None and not 0 <= seed <= _LARGEST:
        raise RecipeError(f"{key} is {seed}; it must lie between 0 and {_LARGEST}")
