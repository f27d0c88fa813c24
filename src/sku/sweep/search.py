"""Which alphas are measured: a grid, or a bisection."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sku.sweep.points import SweepPoint

Measure = Callable[[float], SweepPoint]


def along_grid(
    alphas: Sequence[float], measure: Measure, is_hopeless: Callable[[SweepPoint], bool]
) -> tuple[list[SweepPoint], list[float]]:
    """Measures from the smallest alpha up, and stops behind the first hopeless one.

    Args:
        alphas: In any order, repeats once.
        measure: Called once an alpha.
        is_hopeless: Whether larger alphas need not be tried.

    Returns:
        The points in order, and the alphas that were left out.
    """
    ordered = sorted(set(alphas))
    points: list[SweepPoint] = []
    for place, alpha in enumerate(ordered):
        points.append(measure(alpha))
        if is_hopeless(points[-1]):
            return points, ordered[place + 1 :]
    return points, []


def by_bisection(
    low: float, high: float, tolerance: float, measure: Measure, is_enough: Callable[[SweepPoint], bool]
) -> list[SweepPoint]:
    """Halves the bounds around the alpha at which ``is_enough`` turns true.

    ``low`` is taken for not enough and not measured; ``high`` is measured first, and alone where it is not enough.
    Where ``is_enough`` turns more than once, one of the turns is found, not always the lowest: what lies between the
    measured points is not known, so a rule must look at the points themselves.

    Args:
        low: Lower bound.
        high: Upper bound.
        tolerance: Largest distance of the bounds at the end.
        measure: Called once an alpha.
        is_enough: Whether to look lower.

    Returns:
        All measured points, by alpha.
    """
    points = [measure(high)]
    if is_enough(points[0]):
        while high - low > tolerance:
            middle = (low + high) / 2
            if not low < middle < high:
                break  # The tolerance is finer than numbers are here.
            points.append(measure(middle))
            if is_enough(points[-1]):
                high = middle
            else:
                low = middle
    return sorted(points, key=lambda point: point.alpha)
