"""One column of the overview picture: an axis for its measure, and in each row two dots with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from sku.report.method_points import Role
from sku.report.method_statistics import Estimate
from sku.report.method_tables import ABSENT, ratio_text

METHOD, CONTROL = "#0072B2", "#767676"
"""Colours of the rows. Roles are told apart by filling alone, so that no reader needs the colours."""
_INK, _FAINT, _BAND = "#222222", "#D9D9D9", "#F4F4F4"
_OFFSET: Mapping[Role, float] = {"best": -0.18, "published": 0.18}
"""Rows above and below the middle of a row."""
_LEAST, _WIDEST = 0.9, 2.0
"""Ends of the perplexity axis, unless a ratio lies below; what lies beyond x2 is told by a number."""
_NEAR_TICKS, _FAR_TICKS = (0.9, 1, 1.1, 1.2, 1.3), (0.25, 0.5, 0.75, 1, 1.4, 2)
_GREY_TEXT: dict[str, Any] = {"color": CONTROL, "fontsize": 8, "fontstyle": "italic"}


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What one column shows."""

    field: str
    """Of ``ComparisonRow``."""
    title: str
    of: str
    """Whose prompts or answers."""
    better: Literal["lower", "higher"]
    ratio: bool = False
    """Over the base model's, on a logarithmic axis; else a rate, shown in percent."""


@dataclass(frozen=True, kw_only=True)
class OverviewRow:
    """One row of the picture."""

    name: str
    title: str
    control: bool
    failed: bool
    """Every seed failed."""
    estimates: Mapping[Role, Mapping[str, Estimate]]
    """Role -> field of ``ComparisonRow`` -> what was measured."""

    def cell(self, measure: Measure) -> dict[Role, Estimate]:
        """What there is to draw of a measure."""
        found = {role: estimates.get(measure.field) for role, estimates in self.estimates.items()}
        return {role: estimate for role, estimate in found.items() if estimate is not None}


def dot_look(role: Role, colour: str) -> dict[str, Any]:
    """Of a dot: filled for ``best``, hollow for ``published``."""
    return {
        "markerfacecolor": colour if role == "best" else "white", "markeredgecolor": colour, "markeredgewidth": 1.4,
        "markersize": 5.5,
    }  # fmt: skip


def draw_measure(axes: Axes, measure: Measure, rows: Sequence[OverviewRow]) -> None:
    """Draws one column.

    Args:
        axes: Empty; row i is put at height i, from the top.
        measure: What is shown.
        rows: From top to bottom, controls last.
    """
    _set_height(axes, rows)
    _set_title(axes, measure)
    if measure.ratio:
        _set_ratio_axis(axes, [estimate for row in rows for estimate in row.cell(measure).values()])
    else:
        axes.set_xlim(-3, 103)
        axes.set_xticks([0, 25, 50, 75, 100], ["0", "", "50", "", "100 %"])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for height, row in enumerate(rows):
        cell = row.cell(measure)
        for role, estimate in cell.items():
            offset = _OFFSET[role] if len(cell) > 1 else 0.0
            _draw_dot(axes, height + offset, estimate, role, CONTROL if row.control else METHOD, measure.ratio)
        if not cell:
            words = "failed" if row.failed else ABSENT
            axes.text(0.5, height, words, ha="center", va="center", transform=axes.get_yaxis_transform(), **_GREY_TEXT)


def _set_height(axes: Axes, rows: Sequence[OverviewRow]) -> None:
    """Bands that lead the eye along the rows, and a line above the first control."""
    axes.set_ylim(len(rows) - 0.45, -0.55)
    for height in range(0, len(rows), 2):
        axes.axhspan(height - 0.5, height + 0.5, color=_BAND, linewidth=0, zorder=0)
    for height, (above, below) in enumerate(pairwise(rows)):
        if below.control and not above.control:
            axes.axhline(height + 0.5, color=_INK, linewidth=0.8, zorder=1)


def _set_title(axes: Axes, measure: Measure) -> None:
    goal = "\u2190 lower is better" if measure.better == "lower" else "higher is better \u2192"
    axes.set_title(measure.title, loc="left", fontsize=10, fontweight="bold", pad=28)
    axes.annotate(
        f"{measure.of}\n{goal}", (0, 1), xytext=(0, 4), xycoords="axes fraction", textcoords="offset points",
        va="bottom", fontsize=8, color=CONTROL,
    )  # fmt: skip


def _set_ratio_axis(axes: Axes, estimates: Sequence[Estimate]) -> None:
    values = [value for estimate in estimates for value in (estimate.value, estimate.low, estimate.high)]
    left, right = min(_LEAST, *(value / 1.04 for value in values)), min(_WIDEST, max(1.25, *values))
    ticks = _NEAR_TICKS if right < 1.35 and left > 0.8 else _FAR_TICKS
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.axvline(1, color=_INK, linewidth=0.8, zorder=1)
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if left <= tick <= right]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"\u00d7{value:g}")


def _draw_dot(axes: Axes, height: float, estimate: Estimate, role: Role, colour: str, ratio: bool) -> None:
    scale = 1 if ratio else 100
    value, low, high = (scale * number for number in (estimate.value, estimate.low, estimate.high))
    right = max(axes.get_xlim())
    axes.plot(
        [min(low, right), min(high, right)], [height] * 2, color=colour, linewidth=1.6, solid_capstyle="butt", zorder=3
    )
    beyond = value > right
    axes.plot(min(value, right), height, ">" if beyond else "o", clip_on=False, zorder=4, **dot_look(role, colour))
    if beyond:
        axes.annotate(
            f"\u00d7{ratio_text(value)}", (right, height), xytext=(6, 0), textcoords="offset points",
            va="center_baseline", fontsize=7, color=colour, annotation_clip=False,
        )  # fmt: skip
