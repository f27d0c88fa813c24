"""The frontier of a sweep as a picture: what each alpha leaves of harm, and what it costs normal behaviour."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sku.evaluate.metrics import Rate
from sku.report.figures import STYLE, bare, check_suffix, light, save_figure, share_axis
from sku.sweep import Replies, Sweep, SweepPoint

_INK, _FAINT, _GREY = light("ink"), light("faint"), light("base")
_HARM, _REFUSAL, _GIBBERISH = light("harmful"), light("refusal"), light("gibberish")
_PREFILL = tuple(light(f"prefill_{place}") for place in range(1, 6))
"""Light for short prefills, dark for long ones; the last stands for all that are longer still."""
_MARKERS = "s^vDP"

FIGURES = ("frontier.png", "frontier.svg")


def write_frontier(sweep: Sweep, folder: Path) -> None:
    """Draws ``FIGURES`` into a folder.

    Raises:
        OutputError: The folder can't be written.
    """
    for name in FIGURES:
        frontier_figure(sweep, folder / name)


def frontier_figure(sweep: Sweep, path: Path) -> Path:
    """Draws a sweep: rates and utility cost over alpha, and harm against that cost.

    Ranges are 95 % intervals (Wilson). Alphas whose model was not asked have no rates; a cost beyond the axis is drawn
    at its edge as an arrow.

    Args:
        sweep: Finished.
        path: ``.png``, ``.svg`` or ``.pdf``; what is there is replaced.

    Returns:
        ``path``.

    Raises:
        OutputError: Another suffix, or a folder that can't be written.
    """
    check_suffix(path)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 5.6), layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=(1.9, 1))
        rates = figure.add_subplot(grid[0, 0])
        cost = figure.add_subplot(grid[1, 0], sharex=rates)
        draw_sweep(sweep, rates, cost, figure.add_subplot(grid[0, 1]))
        names = figure.add_subplot(grid[1, 1])
        names.axis("off")
        lines, words = rates.get_legend_handles_labels()
        names.legend(lines, words, frameon=False, fontsize=8.5, loc="center", ncols=2, handlelength=3)
        rates.tick_params(labelbottom=False)
        figure.supxlabel(textwrap.fill(_footer(sweep), 165), fontsize=7.5, color=_GREY, x=0.005, ha="left")
        save_figure(figure, path)
    return path


def draw_sweep(sweep: Sweep, rates: Axes, cost: Axes, frontier: Axes) -> None:
    """Draws a sweep: rates and utility cost over alpha, and harm against that cost.

    Args:
        sweep: Finished.
        rates: Gets the rates; its artists are labelled for a legend.
        cost: Gets the cost.
        frontier: Gets harm against cost.
    """
    measured = [point for point in (sweep.base, *sweep.points) if point.perplexity is not None]
    asked = [point for point in measured if point.replies is not None]
    _draw_rates(rates, asked)
    _draw_cost(cost, measured, sweep)
    _draw_frontier(frontier, asked, sweep)
    _mark_pick((rates, cost), sweep)


def _draw_rates(axes: Axes, points: Sequence[SweepPoint]) -> None:
    replies = [(point.alpha, cast(Replies, point.replies)) for point in points]
    lengths = sorted({tokens for _, found in replies for tokens in found.prefill})

    def line(values: Sequence[tuple[float, Rate]], colour: str, label: str, **style: Any) -> None:
        alphas = [alpha for alpha, _ in values]
        axes.plot(alphas, [rate.value for _, rate in values], color=colour, label=label, **style)
        axes.vlines(
            alphas, [rate.low for _, rate in values], [rate.high for _, rate in values],
            color=colour, linewidth=1, alpha=0.35,
        )  # fmt: skip

    line([(alpha, found.harmful) for alpha, found in replies], _HARM, "harmful", marker="o", linewidth=2.2)
    for place, tokens in enumerate(lengths):
        shade, marker = (kinds[min(place, len(kinds) - 1)] for kinds in (_PREFILL, _MARKERS))
        label = f"harmful, prefill of {tokens} token{'s' if tokens > 1 else ''}"
        values = [(alpha, found.prefill[tokens]) for alpha, found in replies]
        line(values, shade, label, marker=marker, markersize=4.5, linewidth=1.3)
    dashed: dict[str, Any] = {"linewidth": 1.6, "markersize": 4.5}
    line([(alpha, found.gibberish) for alpha, found in replies], _GIBBERISH, "gibberish", ls="--", **dashed)
    refused = [(alpha, found.over_refusal) for alpha, found in replies]
    line(refused, _REFUSAL, "normal prompts refused", ls=":", marker="x", **dashed)
    share_axis(axes, "y")
    _finish(axes, "Replies")


def _draw_cost(axes: Axes, points: Sequence[SweepPoint], sweep: Sweep) -> None:
    top = _highest(points, sweep)
    values = [sweep.cost(point).value for point in points]
    shown = [(point.alpha, value) for point, value in zip(points, values, strict=True) if value <= top]
    axes.plot([alpha for alpha, _ in shown], [value for _, value in shown], "o-", color=_INK, markersize=4)
    for point, value in zip(points, values, strict=True):
        if value > top:
            axes.plot(point.alpha, top, "^", color=_INK, markersize=6, clip_on=False)
            axes.annotate(
                f"{value:.3g}", (point.alpha, top), xytext=(0, -11), textcoords="offset points", ha="center",
                fontsize=7.5,
            )  # fmt: skip
    axes.axhline(1, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_ylim(-0.05, top)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel("alpha")
    _finish(axes, "Utility cost, in shares of the budget")


def _draw_frontier(axes: Axes, points: Sequence[SweepPoint], sweep: Sweep) -> None:
    top, pick = _highest(points, sweep), sweep.pick
    costs = [(point, sweep.cost(point).value) for point in points]
    shown = [(point, cost, cast(Replies, point.replies).harm[1]) for point, cost in costs if cost <= top]
    axes.plot([x for _, x, _ in shown], [harm.value for _, _, harm in shown], "-", color=_HARM, linewidth=1.2)
    labels: dict[tuple[float, float], list[str]] = {}
    for point, cost, harm in shown:
        chosen = pick is not None and point.alpha == pick.alpha
        near = (cost, harm.value)
        for place in labels:
            if abs(place[0] - cost) < top / 40 and abs(place[1] - harm.value) < 0.04:
                near = place  # Two labels would lie on each other.
        labels.setdefault(near, []).append("base" if point.alpha == 0 else f"{point.alpha:g}")
        axes.vlines(cost, harm.low, harm.high, color=_HARM, alpha=0.35)
        axes.plot(
            cost, harm.value, "*" if chosen else "o", color=_INK if chosen else _HARM,
            markersize=15 if chosen else 6, zorder=4,
        )  # fmt: skip
    for (cost, share), names in labels.items():
        axes.annotate(", ".join(names), (cost, share), xytext=(7, 5), textcoords="offset points", fontsize=8.5)
    axes.axvline(1, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        "budget", (1, 1), xycoords=("data", "axes fraction"), xytext=(3, -9),
        textcoords="offset points", fontsize=7.5, color=_GREY,
    )  # fmt: skip
    if sweep.config.rule == "lowest_alpha":
        axes.axhline(sweep.config.harm_target, color=_HARM, linewidth=1, linestyle=(0, (4, 3)))
    share_axis(axes, "y")
    axes.set_ylim(top=1.1)  # For the label of the base, below the heading.
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("utility cost, in shares of the budget")
    _finish(axes, "Largest harmful rate against cost, by alpha")


def _mark_pick(every: Sequence[Axes], sweep: Sweep) -> None:
    pick = sweep.pick
    if pick is None or pick.alpha is None:
        return
    for axes in every:
        axes.axvline(pick.alpha, color=_INK, linewidth=1.1, zorder=1)
    label = f"{'chosen' if pick.met else 'nearest'}: {pick.alpha:g}"
    every[0].annotate(
        label, (pick.alpha, 0.5), xycoords=("data", "axes fraction"), xytext=(-4, 0), textcoords="offset points",
        rotation=90, ha="right", va="center", fontsize=8.5, fontweight="bold",
    )  # fmt: skip


def _finish(axes: Axes, title: str) -> None:
    bare(axes, title).grid(color=_FAINT, linewidth=0.7)


def _highest(points: Sequence[SweepPoint], sweep: Sweep) -> float:
    """End of the cost axis: a model that is ruined must not squeeze the others together."""
    return min(max([1.5, *(1.02 * sweep.cost(point).value for point in points)]), 6)


def _footer(sweep: Sweep) -> str:
    why = "" if sweep.pick is None else f" {sweep.pick.why[0].upper()}{sweep.pick.why[1:]}."
    return (
        f"{sweep.model}, {sweep.asked['harmful']} prompts of forget_validation and {sweep.asked['normal']} of "
        f"retain_validation, seed {sweep.seed}. Judge: {sweep.judge.name}. Ranges: 95 % intervals.{why}"
    )
