"""The controls of the trade-off picture: grey markers whose names cover neither each other nor a marker."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise

from matplotlib.axes import Axes

from sku.report.trade_off_curves import Curve, Place

GREY = "#767676"
_MARKERS = "oXsD^v"
_CHARACTER, _LINE, _MARKER = 0.0155, 0.036, 0.03
"""Width of a character, height of a line and size of a marker, as shares of a panel of ``trade_off_figure``."""

Box = tuple[float, float, float, float]
"""Left, bottom, right and top, as shares of the panel."""


def draw_controls(axes: Axes, curves: Sequence[Curve]) -> None:
    """Draws each control where it is as published; one that has no perplexity stands on the right border.

    Args:
        axes: With its final limits.
        curves: Of the controls.
    """
    placed = [(curve.title, curve.published) for curve in curves if curve.published is not None]
    _draw_inside(axes, [(title, place) for title, place in placed if place.x is not None])
    _draw_on_border(axes, [(title, place.y[0]) for title, place in placed if place.x is None])


def _draw_inside(axes: Axes, controls: Sequence[tuple[str, Place]]) -> None:
    right = max(axes.get_xlim())
    points = [(min(place.x[0], right), place.y[0]) for _, place in controls if place.x is not None]
    shares = [tuple(axes.transLimits.transform(axes.transScale.transform(point))) for point in points]
    taken = [_around(*share) for share in shares]
    for index, ((title, _), point, share) in enumerate(zip(controls, points, shares, strict=True)):
        axes.plot(
            *point, _MARKERS[index % len(_MARKERS)], color=GREY, markersize=7, markeredgecolor="white", clip_on=False,
            zorder=7,
        )  # fmt: skip
        boxes = list(_boxes(title, *share))
        free = [box for box in boxes if _fits(box, taken)]
        box = free[0] if free else boxes[0]
        taken.append(box)
        axes.text(
            box[0], (box[1] + box[3]) / 2, title, va="center_baseline", fontsize=8, color=GREY,
            transform=axes.transAxes, zorder=6.5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
        )  # fmt: skip


def _around(x: float, y: float) -> Box:
    return x - _MARKER / 2, y - _MARKER / 2, x + _MARKER / 2, y + _MARKER / 2


def _boxes(title: str, x: float, y: float) -> Iterator[Box]:
    """Where a name may stand, the best place first: beside its marker, above, below, then ever farther away."""
    width, gap = _CHARACTER * len(title), 0.6 * _MARKER
    for rise in (0.0, _LINE, -_LINE, 2 * _LINE, -2 * _LINE):
        bottom = y - _LINE / 2 + rise
        for left in (x + gap, x - gap - width):
            yield left, bottom, left + width, bottom + _LINE


def _fits(box: Box, taken: Sequence[Box]) -> bool:
    left, bottom, right, top = box
    inside = left >= 0 and bottom >= 0 and right <= 1 and top <= 1
    return inside and all(
        right <= other[0] or left >= other[2] or top <= other[1] or bottom >= other[3] for other in taken
    )


def _draw_on_border(axes: Axes, controls: Sequence[tuple[str, float]]) -> None:
    border = axes.get_yaxis_transform()
    bottom, top = axes.get_ylim()
    heights = _apart([height for _, height in controls], 2 * _LINE * (top - bottom))
    for (title, height), text_height in zip(controls, heights, strict=True):
        axes.plot(1, height, "<", color=GREY, markersize=6, transform=border, clip_on=False, zorder=7)
        axes.text(1.03, text_height, textwrap.fill(title, 12), va="center", fontsize=8, color=GREY, transform=border)


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Heights at least ``gap`` apart, in the same order: the lowest stays, the others move up where they must."""
    placed = list(heights)
    for below, index in pairwise(sorted(range(len(placed)), key=placed.__getitem__)):
        placed[index] = max(placed[index], placed[below] + gap)
    return placed
