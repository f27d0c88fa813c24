"""Which alphas are asked: those that are given, or those below the border at which the utility budget binds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sku.evaluate.utility_cost import BISECTIONS, Border, UtilityCost, find_border
from sku.sweep.points import SweepPoint

Measure = Callable[[float], SweepPoint]
FIRST, LARGEST = 2.0**-5, 2.0**10
"""Where the search for the border begins and ends. Recipes whose vector is filtered need 30 to 60."""
SMALLEST = FIRST / 2**BISECTIONS
"""The smallest alpha that the search tries."""
STEP = 2**0.5
"""From one alpha that is asked to the next larger one."""


def along_grid(
    alphas: Sequence[float], measure: Measure, is_hopeless: Callable[[SweepPoint], bool]
) -> tuple[list[SweepPoint], list[float]]:
    """Measures from the smallest alpha up, and stops after the first hopeless one.

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


def border_of(cost: Callable[[float], UtilityCost]) -> Border:
    """Where the budget binds, from scores of normal text alone.

    Args:
        cost: Alpha -> cost.

    Returns:
        The border; strength 0 where even ``SMALLEST`` is beyond the budget.
    """
    return find_border(cost, first=FIRST, largest=LARGEST)


def below(border: float, points: int) -> tuple[float, ...]:
    """The alphas that are asked: the border, and others below it, each smaller by ``STEP``.

    Args:
        border: The largest alpha within the budget; 0 where there is none.
        points: How many.

    Returns:
        From the smallest. For a border of 0 the smallest alpha that was tried, to show what is beyond its limit.
    """
    if border == 0:
        return (SMALLEST,)
    # Rounded, so that a reader can type them; the border itself is not, or it could be beyond the budget.
    return (*(float(f"{border / STEP**step:.3g}") for step in range(points - 1, 0, -1)), border)
