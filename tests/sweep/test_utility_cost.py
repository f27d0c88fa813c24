"""What a change costs normal behaviour, and the largest strength within the budget, on costs whose border is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from sku.config import SweepConfig
from sku.sweep import (
    BISECTIONS,
    BROKEN_COST,
    OVER_REFUSAL,
    BudgetLimit,
    UtilityCost,
    find_budget_limit,
    utility_cost,
)

LIMITS = SweepConfig(utility_budget=1.1)
"""So KL may be ln 1.1 = 0.0953."""
SAME = {"retain_validation": 1.0, "normal_validation:own": 1.0}
NONE = {"retain_validation": 0.0, "normal_validation:own": 0.0}


@pytest.mark.parametrize(
    ("perplexity", "kl", "refused", "value", "bound_by"),
    [
        ({**SAME, "normal_validation:own": 1.1}, NONE, 0.0, 1.0, "perplexity of normal_validation:own"),
        # Better on the set that a method's normal data are like, and worse on the other: as seven methods are.
        (
            {"retain_validation": 0.6, "normal_validation:own": 1.9}, NONE, 0.0, 6.734,
            "perplexity of normal_validation:own",
        ),
        ({"retain_validation": 0.6}, {"retain_validation": 0.12}, 0.0, 1.259, "KL on retain_validation"),
        (SAME, {**NONE, "normal_validation:own": 0.025}, 0.1, 2.0, OVER_REFUSAL),
    ],
)  # fmt: skip
def test_the_worst_part_is_the_cost(
    perplexity: dict[str, float], kl: dict[str, float], refused: float, value: float, bound_by: str
) -> None:
    found = utility_cost(LIMITS, perplexity=perplexity, kl=kl, over_refusal=refused)
    assert found.value == pytest.approx(value, abs=1e-3)
    assert found.bound_by == bound_by
    assert found.within == (value <= 1)


def test_a_part_at_its_limit_is_within_the_budget() -> None:
    perplexity, kl = {"retain_validation": 1.1}, {"retain_validation": 0.0953}
    assert utility_cost(LIMITS, perplexity=perplexity, kl=kl, over_refusal=0.15 - 0.1).within
    assert not utility_cost(LIMITS, perplexity=perplexity, kl={"retain_validation": 0.0954}).within


def cost_at(value: float) -> UtilityCost:
    return UtilityCost(value=value, bound_by="KL on retain_validation")


@pytest.mark.parametrize("border", [0.2, 3.3])
def test_the_border_is_found_from_below(border: float) -> None:
    """Cost s / border reaches 1 at the border; the last doubling is at most the border wide."""
    found = find_budget_limit(lambda s: cost_at(s / border), first=0.125, largest=64.0)
    assert found.strength <= border
    assert border - found.strength <= border / 2**BISECTIONS + 1e-12
    assert found.bound_by == "KL on retain_validation"


def test_a_budget_that_never_binds_gives_the_largest() -> None:
    asked: list[float] = []

    def cost(strength: float) -> UtilityCost:
        asked.append(strength)
        return cost_at(0.9)

    assert find_budget_limit(cost, first=0.125, largest=4.0) == BudgetLimit(strength=4.0, bound_by=None)
    assert asked == [0.125, 0.25, 0.5, 1.0, 2.0, 4.0]


@pytest.mark.parametrize("cost", [lambda s: cost_at(2.0), lambda s: BROKEN_COST, lambda s: cost_at(math.nan)])
def test_no_strength_within_the_budget_is_strength_0(cost: Callable[[float], UtilityCost]) -> None:
    assert find_budget_limit(cost, first=0.125, largest=4.0) == BudgetLimit(strength=0.0, bound_by=cost(1.0).bound_by)


def test_the_part_that_binds_is_the_one_just_above_the_border() -> None:
    """Far above it another part can be the worst: a perplexity that explodes."""

    def cost(strength: float) -> UtilityCost:
        kl = UtilityCost(value=strength, bound_by="KL on normal_validation:own")
        return kl if strength < 1.5 else UtilityCost(value=100.0, bound_by="perplexity of normal_validation:own")

    found = find_budget_limit(cost, first=0.125, largest=4.0)
    assert (found.strength, found.bound_by) == (1.0, "KL on normal_validation:own")
