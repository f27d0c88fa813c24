"""The largest strength within a budget, on costs whose border is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from sku.comparison.strength import BISECTIONS, FIRST_PROBE, largest_within_budget


@pytest.mark.parametrize("border", [0.2, 0.5, 1.0, 3.3])
def test_the_border_is_found_from_below(border: float) -> None:
    """Cost 1 + 0.05 s / border reaches 1.05 at the border; the last doubling is at most the border wide."""
    strength, cost = largest_within_budget(lambda s: 1 + 0.05 * s / border, 1.05, 4.0)
    assert strength <= border
    assert cost == pytest.approx(1 + 0.05 * strength / border)
    assert cost <= 1.05
    assert border - strength <= border / 2**BISECTIONS + 1e-12


def test_a_budget_that_is_never_met_gives_the_maximum() -> None:
    asked: list[float] = []

    def cost(strength: float) -> float:
        asked.append(strength)
        return 0.9

    assert largest_within_budget(cost, 1.05, 4.0) == (4.0, 0.9)
    assert asked == [0.125, 0.25, 0.5, 1.0, 2.0, 4.0]


@pytest.mark.parametrize("cost", [lambda s: 2.0, lambda s: math.inf, lambda s: math.nan])
def test_no_strength_within_the_budget_is_strength_0(cost: Callable[[float], float]) -> None:
    assert largest_within_budget(cost, 1.05, 4.0) == (0.0, 1.0)


def test_what_lies_behind_the_first_border_is_not_reached() -> None:
    """The cost is beyond the budget between 0.7 and 1.8 and within it again after that."""
    strength, _ = largest_within_budget(lambda s: 2.0 if 0.7 < s < 1.8 else 1.0, 1.05, 4.0)
    assert 0.68 < strength <= 0.7


def test_a_maximum_that_no_doubling_meets_is_probed_itself() -> None:
    asked: list[float] = []

    def cost(strength: float) -> float:
        asked.append(strength)
        return 1.0

    assert largest_within_budget(cost, 1.05, 3.0)[0] == 3.0
    assert asked[0] == 3.0 * FIRST_PROBE
    assert asked[-1] == 3.0
