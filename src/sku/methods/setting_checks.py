"""Checks that the settings of all methods share; each message names the key in the recipe and the value."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sku.errors import RecipeError


def setting_key(method: str, name: str) -> str:
    """Where a recipe holds a method's own setting."""
    return f"methods.{method}.settings.{name}"


def check_positive(method: str, name: str, value: float) -> None:
    """Refuses a number that is not above 0 and finite.

    Args:
        method: Name of the method.
        name: Name of the setting.
        value: What it is set to.

    Raises:
        RecipeError: With key and value.
    """
    if not (value > 0 and math.isfinite(value)):
        raise RecipeError(f"{setting_key(method, name)} is {value}; it must be above 0 and finite")


def check_weights(method: str, weights: Mapping[str, float]) -> None:
    """Refuses weights of loss terms that are negative, not finite, or all 0.

    Args:
        method: Name of the method.
        weights: Name of the setting -> weight of its term; 0 leaves the term out.

    Raises:
        RecipeError: With key and value, or where nothing is left to train.
    """
    for name, weight in weights.items():
        if not (weight >= 0 and math.isfinite(weight)):
            raise RecipeError(f"{setting_key(method, name)} is {weight}; it must be 0 or more and finite")
    if not any(weights.values()):
        keys = " and ".join(setting_key(method, name) for name in weights)
        raise RecipeError(f"{keys} leave no term on: there is nothing to train; set a weight above 0")
