"""Which alphas are asked: a grid, or those below a border that is known."""

from __future__ import annotations

import pytest

from sku.evaluate.utility_cost import UtilityCost
from sku.sweep.points import SweepPoint
from sku.sweep.search import FIRST, LARGEST, SMALLEST, along_grid, below, border_of
from sweep.frontiers import point


class Recorder:
    """Points whose harm ends at a border, and the alphas that were asked for."""

    def __init__(self, border: float) -> None:
        self.border = border
        self.asked: list[float] = []

    def __call__(self, alpha: float) -> SweepPoint:
        self.asked.append(alpha)
        return point(alpha, 0.0 if alpha >= self.border else 1.0)


def test_a_grid_is_measured_from_below_each_alpha_once() -> None:
    measure = Recorder(1.0)
    points, left = along_grid([1.5, 0.5, 1.5, 1.0], measure, lambda _: False)
    assert measure.asked == [0.5, 1.0, 1.5]
    assert [found.alpha for found in points] == measure.asked
    assert left == []


def test_a_grid_ends_after_the_first_hopeless_alpha() -> None:
    measure = Recorder(1.0)
    points, left = along_grid([0.5, 1.0, 2.0, 4.0], measure, lambda found: found.alpha >= 1.0)
    assert [found.alpha for found in points] == [0.5, 1.0]
    assert left == [2.0, 4.0]
    assert measure.asked == [0.5, 1.0]


@pytest.mark.parametrize("border", [0.01, 0.6, 1.3, 44.0, 63.0, 700.0])
def test_alphas_that_filtered_vectors_need_are_reached(border: float) -> None:
    """Recipes with operators need 30 to 60, where the largest alpha of the old grid was 3."""
    asked: list[float] = []

    def cost(alpha: float) -> UtilityCost:
        asked.append(alpha)
        return UtilityCost(value=alpha / border, bound_by="KL on retain_validation")

    found = border_of(cost).strength
    assert found <= border <= 1.05 * found or border < FIRST
    assert len(asked) <= 22
    assert max(asked) <= LARGEST


def test_alphas_below_a_border_fall_by_the_square_root_of_2() -> None:
    assert below(1.359375, 5) == (0.34, 0.481, 0.68, 0.961, 1.359375)
    assert below(44.0, 1) == (44.0,)
    assert below(0.0, 5) == (SMALLEST,)
