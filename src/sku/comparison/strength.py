"""At which strength methods are compared: the largest one that stays within a utility budget."""

from __future__ import annotations

from collections.abc import Callable

FIRST_PROBE = 1 / 32
"""Of the largest strength: where the search begins."""
BISECTIONS = 5
"""Halvings between the last strength within the budget and the first beyond: to 3 % of their distance."""


def largest_within_budget(cost: Callable[[float], float], budget: float, maximum: float) -> tuple[float, float]:
    """The largest strength, on the way up from 0, whose cost stays within a budget.

    Strengths are doubled until one goes beyond; between it and the one before the border is bisected. A cost that
    rises beyond the budget and falls again is not followed: what lies behind the first border is not reached by
    turning the strength up slowly.

    Args:
        cost: Strength -> cost; infinite where the model breaks. At strength 0 the budget holds.
        budget: Most that is allowed.
        maximum: Largest strength tried.

    Returns:
        The strength and its cost: ``maximum`` where the budget is never met, 0 and 1 where no strength tried fits.
    """
    low, low_cost = 0.0, 1.0
    high = maximum * FIRST_PROBE
    while (high_cost := cost(high)) <= budget:
        low, low_cost = high, high_cost
        if high == maximum:
            return low, low_cost
        high = min(2 * high, maximum)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        middle_cost = cost(middle)
        if middle_cost <= budget:
            low, low_cost = middle, middle_cost
        else:
            high = middle
    return low, low_cost
