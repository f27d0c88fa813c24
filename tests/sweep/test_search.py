"""Which alphas a grid and a bisection measure, on borders that are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sku.sweep.points import SweepPoint
from sku.sweep.search import along_grid, by_bisection
from sweep.frontiers import point


class Recorder:
    """Points whose harm ends at a border, and the alphas that were asked for."""

    def __init__(self, border: float) -> None:
        self.border = border
        self.asked: list[float] = []

    def __call__(self, alpha: float) -> SweepPoint:
        self.asked.append(alpha)
        return point(alpha, 0.0 if alpha >= self.border else 1.0)


def gone(found: SweepPoint) -> bool:
    return found.replies is not None and found.replies.harmful.value == 0


def test_a_grid_is_measured_from_below_each_alpha_once() -> None:
    measure = Recorder(1.0)
    points, left = along_grid([1.5, 0.5, 1.5, 1.0], measure, lambda _: False)
    assert measure.asked == [0.5, 1.0, 1.5]
    assert [found.alpha for found in points] == measure.asked
    assert left == []


def test_a_grid_ends_behind_the_first_hopeless_alpha() -> None:
    measure = Recorder(1.0)
    points, left = along_grid([0.5, 1.0, 2.0, 4.0], measure, lambda found: found.alpha >= 1.0)
    assert [found.alpha for found in points] == [0.5, 1.0]
    assert left == [2.0, 4.0]
    assert measure.asked == [0.5, 1.0]


@given(border=st.floats(0.01, 3.99), tolerance=st.floats(0.01, 2.0))
def test_a_bisection_ends_near_the_border(border: float, tolerance: float) -> None:
    measure = Recorder(border)
    points = by_bisection(0.0, 4.0, tolerance, measure, gone)
    lowest = min(found.alpha for found in points if gone(found))
    assert border <= lowest <= border + tolerance
    assert sorted(measure.asked) == [found.alpha for found in points]
    assert len(set(measure.asked)) == len(measure.asked)


def test_a_bisection_whose_upper_bound_is_not_enough_measures_nothing_else() -> None:
    measure = Recorder(9.0)
    assert [found.alpha for found in by_bisection(0.0, 4.0, 0.1, measure, gone)] == [4.0]


def test_a_bisection_of_two_turns_finds_one_of_them_and_keeps_all_points() -> None:
    """Enough between 0.4 and 0.9 and above 3: the search stays above, and its points show it."""

    def measure(alpha: float) -> SweepPoint:
        return point(alpha, 0.0 if 0.4 <= alpha <= 0.9 or alpha > 3 else 1.0)

    points = by_bisection(0.0, 4.0, 0.1, measure, gone)
    assert 3 < min(found.alpha for found in points if gone(found)) < 3.2


@pytest.mark.parametrize("is_enough", [lambda _: True])
def test_a_tolerance_finer_than_numbers_still_ends(is_enough: Callable[[SweepPoint], bool]) -> None:
    points = by_bisection(1.0, 1.0 + 2**-50, 5e-324, Recorder(0.0), is_enough)
    assert len(points) <= 6
