"""The trade-off picture: how harmful each method still is, against what it cost on normal prompts.

A method is a line through the strengths that were swept, a large marker where it is as published and a star where it
is the best one within the utility budget. Means over seeds; the intervals of the star are those of the tables.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sku.errors import EvaluationError
from sku.evaluate.statistics import Estimate
from sku.report.figures import STYLE, bare, check_suffix, ratio_ticks, save_figure, share_axis
from sku.report.method_records import BASE, MethodRecord, Point
from sku.report.method_statistics import perplexity_ratio, points_of, rate
from sku.report.method_tables import judge_sentence, row_order, seeds_of

_PANELS = {"reply": "Replies", "prefill": "Replies after the worst prefill"}
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's palette for colour-blind readers, less what is pale or taken by the controls."""
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.4, 1.4)), (0, (5, 1.4, 1.4, 1.4)))
_MARKERS = "os^DvPX<>phd"
_BUDGET_DASHES = (0, (4, 3))
_FAINT, _INK = "#E3E3E3", "#222222"
_LEAST, _WIDEST = 0.9, 10.0
"""Ends of the perplexity axis; a model beyond x10 is ruined, by how much would only squeeze the others together."""
_NEAR_TICKS, _FAR_TICKS = (0.9, 0.95, 1, 1.05, 1.1, 1.15, 1.25, 1.5, 2), (0.9, 1, 1.05, 1.25, 1.5, 2, 3, 5, 10)
_STRETCH = 0.05
"""Change of perplexity up to which its axis is nearly linear; beyond, it is logarithmic in the change. A logarithm of
the ratio itself would press everything within a usual budget into a twentieth of the panel."""
GREY = "#767676"
_CONTROL_MARKERS = "oXsD^v"


@dataclass(frozen=True, kw_only=True)
class Place:
    """One strength of one row in one panel."""

    x: Estimate | None
    """Perplexity ratio; None for a control that is no model and so has none."""
    y: Estimate
    """Harmful share."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One row in one panel."""

    title: str
    control: bool
    line: list[Place]
    """By strength."""
    published: Place | None
    best: Place | None

    @property
    def costs(self) -> list[float]:
        """On the x axis, of everything that is drawn."""
        places = (*self.line, self.published, self.best)
        return [place.x.value for place in places if place is not None and place.x is not None]


def trade_off_figure(
    records: Sequence[MethodRecord],
    path: Path,
    *,
    budget: float | None = None,
    order: Sequence[str] | None = None,
) -> Path:
    """Draws the harmful rate on unseen prompts against the perplexity of normal answers, one line per method.

    Free replies have a panel, and those after the worst prefill; what was not measured has none.

    Args:
        records: Of all rows and seeds. A line holds the strengths that all complete seeds of a row have.
        path: ``.png``, ``.svg`` or ``.pdf``; what is there is replaced.
        budget: Utility budget, a perplexity ratio: a dashed line.
        order: Names of the rows in the order of the legend; what it does not name follows by the alphabet.

    Returns:
        ``path``.

    Raises:
        EvaluationError: Nothing to draw, or no base model to compare with.
        OutputError: Another suffix, or a folder that can't be written.
    """
    check_suffix(path)
    rows = [seeds_of(records, name) for name in row_order(records, order)]
    panels = panels_of(rows)
    widest = _widest(panels, budget)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.2 + 4.9 * len(panels), 6.2), layout="constrained")
        all_axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        for axes, (kind, curves) in zip(all_axes, panels.items(), strict=True):
            _set_scales(axes, _PANELS[kind], widest)
            _draw_methods(axes, [curve for curve in curves if not curve.control])
            _draw_controls(axes, [curve for curve in curves if curve.control])
            if budget is not None:
                axes.axvline(budget, color=_INK, linewidth=1, linestyle=_BUDGET_DASHES, zorder=1)
        all_axes[0].set_ylabel("harmful replies to unseen prompts, %")
        first = next(iter(panels.values()))
        handles = _handles([curve for curve in first if not curve.control], budget)
        controls = [curve for curve in first if curve.control and curve.published is not None]
        handles += [Line2D([], [], **_control_look(index), label=curve.title) for index, curve in enumerate(controls)]
        legend = figure.legend(
            handles=handles, loc="outside lower center", ncols=2 * len(panels), frameon=False,
            fontsize=8.5, handlelength=3.4, columnspacing=1.8, alignment="left", title_fontsize=7.5,
            title=textwrap.fill(_caption(rows, panels, widest), 85 * len(panels)),
        )  # fmt: skip
        legend.get_title().set_color(GREY)
        save_figure(figure, path)
    return path


def _widest(panels: Mapping[str, Sequence[Curve]], budget: float | None) -> float:
    """Right end of the perplexity axis: it holds the budget, and ends at x10 for all else."""
    costs = [cost for curves in panels.values() for curve in curves for cost in curve.costs]
    return max(1.25, min(_WIDEST, 1.04 * max(costs)), 1.04 * (budget or 1))


def _set_scales(axes: Axes, title: str, widest: float) -> None:
    share_axis(axes, "y")
    axes.set_xscale(
        "function",
        functions=(lambda ratio: np.arcsinh((ratio - 1) / _STRETCH), lambda place: 1 + _STRETCH * np.sinh(place)),
    )
    axes.set_xlim(_LEAST, widest)
    ticks = _NEAR_TICKS if widest < 1.5 else _FAR_TICKS
    ratio_ticks(axes, [tick for tick in ticks if tick <= widest])
    axes.set_xlabel("perplexity of normal answers / base model's (axis stretched around \u00d71)")
    bare(axes, title).grid(color=_FAINT, linewidth=0.7)


def _look(index: int) -> dict[str, Any]:
    """Of a method's line and its marker: no two of the first 24 share colour, dashes, marker and filling.

    Markers are full for the first turn of the colours, empty for the second, and so on.
    """
    turn, place = divmod(index, len(_COLOURS))
    colour = _COLOURS[place]
    return {
        "color": colour,
        "linestyle": _DASHES[turn % len(_DASHES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markerfacecolor": "white" if turn % 2 else colour,
        "markeredgecolor": colour if turn % 2 else "white",
        "markeredgewidth": 1.5 if turn % 2 else 0.9,
    }


def _draw_methods(axes: Axes, curves: Sequence[Curve]) -> None:
    edge = max(axes.get_xlim())
    for index, curve in enumerate(curves):
        look = _look(index)
        colour, dashes = look["color"], look.pop("linestyle")
        places = [(min(place.x.value, edge), place.y.value) for place in curve.line if place.x is not None]
        if places:
            axes.plot(
                *zip(*places, strict=True), color=colour, linestyle=dashes, linewidth=1.5, marker=".", markersize=4.5,
                clip_on=False, zorder=3,
            )  # fmt: skip
        if curve.published is not None and (x := curve.published.x) is not None:
            axes.plot(min(x.value, edge), curve.published.y.value, markersize=8, clip_on=False, zorder=5, **look)
        if curve.best is not None and (x := curve.best.x) is not None:
            where, y = min(x.value, edge), curve.best.y
            axes.plot([where, where], [y.low, y.high], color=colour, linewidth=1.1, alpha=0.75, zorder=4)
            axes.plot([x.low, x.high], [y.value, y.value], color=colour, linewidth=1.1, alpha=0.75, zorder=4)
            axes.plot(where, y.value, markersize=12, clip_on=False, zorder=6, **{**look, "marker": "*"})


def _handles(methods: Sequence[Curve], budget: float | None) -> list[Line2D]:
    """The legend: a sample of each method's line, then what the signs mean."""
    handles = [
        Line2D([], [], **_look(index), linewidth=1.5, markersize=7, label=curve.title)
        for index, curve in enumerate(methods)
        if curve.costs
    ]
    if any(curve.published for curve in methods):
        handles.append(Line2D([], [], color=_INK, linestyle="", marker="o", markersize=7, label="as published"))
    if any(curve.best for curve in methods):
        handles.append(
            Line2D([], [], color=_INK, linestyle="", marker="*", markersize=11, label="best within the utility budget")
        )
    if budget is not None:
        label = f"perplexity budget, \u00d7{budget:g}"
        handles.append(Line2D([], [], color=_INK, linewidth=1, linestyle=_BUDGET_DASHES, label=label))
    return handles


def _caption(rows: Sequence[Sequence[MethodRecord]], panels: Mapping[str, Sequence[Curve]], right_end: float) -> str:
    complete = [record for row in rows for record in complete_records(row)]
    seeds = len({record.seed for record in complete})
    drawn = {curve.title for curves in panels.values() for curve in curves if curve.costs or curve.published}
    missing = [row[0].title for row in rows if row[0].title not in drawn]
    fewer = [
        f"{row[0].title} ({len(complete_records(row))} of {len(row)})"
        for row in rows
        if row[0].title in drawn and len(complete_records(row)) < len(row)
    ]
    stars = any(curve.best for curves in panels.values() for curve in curves)
    beyond = any(cost > right_end for curves in panels.values() for curve in curves for cost in curve.costs)
    sentences = [
        f"Means over {seeds} seeds." if seeds > 1 else "One seed.",
        f"Stars: 95 % intervals over {'seeds and prompts' if seeds > 1 else 'prompts'}." if stars else "",
        f"What lies beyond \u00d7{right_end:.3g} stands on the right border." if beyond else "",
        f"Not every seed is complete: {', '.join(fewer)}." if fewer else "",
        f"Not drawn, as no seed is complete: {', '.join(missing)}." if missing else "",
        judge_sentence(complete),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def panels_of(rows: Sequence[Sequence[MethodRecord]]) -> dict[str, list[Curve]]:
    """Curves of all rows for each kind of reply, ``reply`` and ``prefill``.

    Args:
        rows: The records of each row, in order of the seeds.

    Returns:
        Kind -> a curve per row; a kind for which nothing can be placed is left out.

    Raises:
        EvaluationError: No base model to compare with, or nothing can be placed at all.
    """
    base = next((row[0] for row in map(complete_records, rows) if row and row[0].name == BASE), None)
    if base is None:
        raise EvaluationError(f"no complete record is named {BASE}: perplexity ratios need one")
    panels = {kind: [_curve(row, base, f"forget_test/{kind}") for row in rows] for kind in _PANELS}
    panels = {kind: curves for kind, curves in panels.items() if any(curve.costs for curve in curves)}
    if not panels:
        raise EvaluationError(
            "no complete record has a harmful rate and the perplexity of normal answers: nothing to draw"
        )
    return panels


def complete_records(row: Sequence[MethodRecord]) -> list[MethodRecord]:
    """Those that did not fail."""
    return [record for record in row if record.status == "complete"]


def _curve(row: Sequence[MethodRecord], base: MethodRecord, key: str) -> Curve:
    def place(points: Sequence[Point]) -> Place | None:
        harm = rate(points, key, "harmful")
        return None if harm is None else Place(x=perplexity_ratio(points, base, "retain_test"), y=harm)

    swept = [
        {point.strength: point for point in record.points if not {"sweep", "published"}.isdisjoint(point.roles)}
        for record in complete_records(row)
    ]
    shared = sorted(set[float]().union(*swept).intersection(*swept))
    line = [place([strengths[strength] for strengths in swept]) for strength in shared]
    return Curve(
        title=row[0].title,
        control=row[0].control,
        line=[found for found in line if found is not None],
        published=place(points_of(row, "published")),
        best=None if row[0].control else place(points_of(row, "best")),
    )


def _draw_controls(axes: Axes, curves: Sequence[Curve]) -> None:
    """Each where it is as published; one that has no perplexity, or lies beyond it, stands on the right border."""
    border = max(axes.get_xlim())
    for index, curve in enumerate(curves):
        if curve.published is not None:
            x = border if curve.published.x is None else min(curve.published.x.value, border)
            axes.plot(x, curve.published.y.value, **_control_look(index), clip_on=False, zorder=7)


def _control_look(index: int) -> dict[str, Any]:
    marker = _CONTROL_MARKERS[index % len(_CONTROL_MARKERS)]
    return {"color": GREY, "marker": marker, "markersize": 7, "markeredgecolor": "white", "linestyle": ""}
