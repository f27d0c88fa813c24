"""Pictures of how a result came about, training, task vector and alphas, and of what undoes it: attacks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from sku.attacks import AttackReport, RelearnLine
from sku.evaluate.metrics import Rate
from sku.report.figures import (
    PAGE_STYLE,
    PALETTE,
    Picture,
    bare,
    draw_rates,
    drawable,
    new_figure,
    share_axis,
)
from sku.report.words import (
    ATTACK_COLUMNS,
    NOTHING,
    RELEARN_COLUMNS,
    attack_rows,
    pairs_text,
    rate_text,
    relearn_rows,
    start_text,
)
from sku.sweep import Replies, Sweep, SweepPoint

_LINES = ("unlearned", "harm", "second", "third", "fourth")
_INK, _HARM = PALETTE["ink"], PALETTE["harmful"]
_PREFILL = tuple(PALETTE[f"prefill_{place}"] for place in range(1, 6))
"""Light for short prefills, dark for long ones; the last stands for all that are longer still."""
_MARKERS = "s^vDP"
_TABLE_ROWS = 12
"""Of the table under the training curves: about so many steps, first and last among them."""


def training_chart(log: Sequence[Mapping[str, float]]) -> Picture:
    """Every loss term over the steps, a panel each, since their units and sizes differ.

    Args:
        log: Logged steps; at least one.
    """
    terms = sorted({name for entry in log for name in entry if name.startswith("loss")})  # "loss" is the first.
    words = {name: name.partition("/")[2].replace("_", " ") or "whole objective" for name in terms}
    with matplotlib.rc_context(PAGE_STYLE):
        figure, panels = new_figure(0.35 + 1.2 * len(terms), len(terms))
        for number, (axes, term) in enumerate(zip(panels, terms, strict=True)):
            points = [(entry["step"], entry[term]) for entry in log if term in entry]
            steps, values = zip(*points, strict=True)
            colour = PALETTE[_LINES[number % len(_LINES)]]
            axes.plot(steps, values, color=colour, linewidth=1.6, marker="o" if len(points) == 1 else "")
            axes.set_title(drawable(words[term]), loc="left", fontsize=10, pad=4)
            axes.grid(axis="y", color=PALETTE["faint"], linewidth=0.7)
            axes.sharex(panels[0])
            axes.tick_params(labelbottom=axes is panels[-1])
        panels[-1].set_xlabel("optimizer step")
    stride = max(1, -(-len(log) // _TABLE_ROWS))
    kept = [*log[::stride], *([log[-1]] if (len(log) - 1) % stride else [])]
    return Picture(
        name="training",
        figure=figure,
        columns=("step", *(words[term] for term in terms)),
        rows=tuple(
            (f"{entry['step']:.0f}", *(f"{entry[term]:.4g}" if term in entry else NOTHING for term in terms))
            for entry in kept
        ),
    )


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
    line([(alpha, found.gibberish) for alpha, found in replies], PALETTE["gibberish"], "gibberish", ls="--", **dashed)
    refused = [(alpha, found.over_refusal) for alpha, found in replies]
    line(refused, PALETTE["refusal"], "normal prompts refused", ls=":", marker="x", **dashed)
    share_axis(axes, "y")
    _finish(axes, "Replies")


def _draw_cost(axes: Axes, points: Sequence[SweepPoint], sweep: Sweep) -> None:
    top = _highest(points, sweep)
    costs = [(point.alpha, sweep.cost(point).value) for point in points]
    axes.plot(*zip(*[cost for cost in costs if cost[1] <= top], strict=True), "o-", color=_INK, markersize=4)
    for alpha, value in costs:
        if value > top:
            axes.plot(alpha, top, "^", color=_INK, markersize=6, clip_on=False)
            axes.annotate(
                f"{value:.3g}", (alpha, top), xytext=(0, -11), textcoords="offset points", ha="center", fontsize=7.5
            )
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
    labels: list[tuple[tuple[float, float], list[str]]] = []
    last = (-math.inf, 0.0)
    for point, cost, harm in shown:
        chosen = pick is not None and point.alpha == pick.alpha
        if abs(last[0] - cost) > top / 30 or abs(last[1] - harm.value) > 0.04:  # Else labels would lie on each other.
            labels.append(((cost, harm.value), []))
        last = (cost, harm.value)
        labels[-1][1].append("base" if point.alpha == 0 else f"{point.alpha:g}")
        axes.vlines(cost, harm.low, harm.high, color=_HARM, alpha=0.35)
        axes.plot(
            cost, harm.value, "*" if chosen else "o", color=_INK if chosen else _HARM,
            markersize=15 if chosen else 6, zorder=4,
        )  # fmt: skip
    for (cost, share), names in labels:
        axes.annotate(", ".join(names), (cost, share), xytext=(7, 5), textcoords="offset points", fontsize=8.5)
    axes.axvline(1, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        "budget", (1, 1), xycoords=("data", "axes fraction"), xytext=(3, -9),
        textcoords="offset points", fontsize=7.5, color=PALETTE["base"],
    )  # fmt: skip
    if sweep.config.harm_target is not None:
        axes.axhline(sweep.config.harm_target, color=_HARM, linewidth=1, linestyle=(0, (4, 3)))
    share_axis(axes, "y")
    axes.set_ylim(top=1.1)  # For the label of the base, below the heading.
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("utility cost, in shares of the budget")
    _finish(axes, "Largest harmful rate against cost, by alpha")


def _finish(axes: Axes, title: str) -> None:
    bare(axes, title).grid(color=PALETTE["faint"], linewidth=0.7)


def _highest(points: Sequence[SweepPoint], sweep: Sweep) -> float:
    """End of the cost axis: a model that is ruined must not squeeze the others together."""
    return min(max([1.5, *(1.02 * sweep.cost(point).value for point in points)]), 6)


def sweep_chart(sweep: Sweep) -> Picture:
    """Shares and utility cost over alpha, and the largest harmful rate against that cost, of a finished sweep.

    Ranges are 95 % intervals (Wilson). Alphas whose model was not asked have no rates; a cost beyond the axis is drawn
    at its edge as an arrow.
    """
    measured = [point for point in (sweep.base, *sweep.points) if point.perplexity is not None]
    asked = [point for point in measured if point.replies is not None]
    with matplotlib.rc_context(PAGE_STYLE):
        figure, (rates, cost, frontier) = new_figure(10.5, 3)
        _draw_rates(rates, asked)
        _draw_cost(cost, measured, sweep)
        _draw_frontier(frontier, asked, sweep)
        if sweep.pick is not None and sweep.pick.alpha is not None:
            for axes in (rates, cost):
                axes.axvline(sweep.pick.alpha, color=_INK, linewidth=1.1, zorder=1)
            rates.annotate(
                f"{'chosen' if sweep.pick.met else 'nearest'}: {sweep.pick.alpha:g}", (sweep.pick.alpha, 0.5),
                xycoords=("data", "axes fraction"), xytext=(-4, 0), textcoords="offset points", rotation=90,
                ha="right", va="center", fontsize=8.5, fontweight="bold",
            )  # fmt: skip
        rates.set_xlabel("alpha")
        rates.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=2, fontsize=9)
    return Picture(
        name="frontier",
        figure=figure,
        columns=_SWEEP_COLUMNS,
        rows=tuple(_table_row(point, sweep) for point in (sweep.base, *sweep.points)),
    )


_SWEEP_COLUMNS = (
    "alpha", "harmful", "harmful, worst prefill", "gibberish", "normal prompts refused", "cost",
    "perplexity, to base", "",
)  # fmt: skip


def _table_row(point: SweepPoint, sweep: Sweep) -> tuple[str, ...]:
    replies, ratio, pick = point.replies, point.perplexity, sweep.pick
    shares: tuple[str, ...] = (NOTHING,) * 4
    if replies is not None:
        tokens = max(replies.prefill, key=lambda tokens: (replies.prefill[tokens].value, -tokens), default=None)
        prefilled = rate_text(replies.prefill.get(tokens or 0)) + start_text(None if tokens is None else str(tokens))
        others = (rate_text(rate) for rate in (replies.gibberish, replies.over_refusal))
        shares = (rate_text(replies.harmful), prefilled, *others)
    told = point.unasked
    if pick is not None and pick.alpha == point.alpha:
        told = "picked" if pick.met else "nearest"
    return (
        f"{point.alpha:g}",
        *shares,
        NOTHING if ratio is None else f"{sweep.cost(point).value:.2f}",
        NOTHING if ratio is None else f"\u00d7{ratio.value:.4g} ({ratio.low:.4g} to {ratio.high:.4g})",
        told,
    )


def attack_chart(report: AttackReport) -> Picture:
    """Harmful share under each attack, for the unlearned model and for the base as a control."""
    titles = {card.name: card.title for card in report.cards}
    rows = [
        (
            f"{titles[result.attack]} {result.setting}".strip(),
            (result.control.harmful.after, result.model.harmful.after),
        )
        for result in report.results
    ]
    with matplotlib.rc_context(PAGE_STYLE):
        figure, (axes,) = new_figure(0.9 + 0.42 * len(rows))
        draw_rates(axes, rows)
    return Picture(
        name="attacks",
        figure=figure,
        columns=ATTACK_COLUMNS,
        rows=tuple(attack_rows(report)),
    )


_DASHES = ("-", "--", ":", "-.")
"""Of the numbers of pairs, the fewest first."""


def relearn_chart(name: str, report: AttackReport) -> Picture:
    """Cost to break: the share of the base's harm that is back over the steps of fine-tuning, at the best rate.

    Args:
        name: Of the model; the base model's control is drawn too.
        report: Its attacks, with results of relearning.
    """
    relearned = report.relearn
    assert relearned is not None
    lines = [
        (who, colour, result.pairs, line)
        for result in relearned.results
        for who, colour, line in ((name, "unlearned", result.model), ("base", "base", result.control))
    ]
    with matplotlib.rc_context(PAGE_STYLE):
        figure, (axes,) = new_figure(3.3 + 0.2 * len(lines))
        _draw_relearning(axes, lines, relearned.base_harmful.count, relearned.steps)
    return Picture(
        name="cost_to_break",
        figure=figure,
        columns=RELEARN_COLUMNS,
        rows=tuple(relearn_rows(report)),
    )


def _draw_relearning(
    axes: Axes, lines: Sequence[tuple[str, str, int, RelearnLine]], base: int, steps: Sequence[int]
) -> None:
    """Each line: name, colour, pairs and checkpoints. The model as it is stands left."""
    start, highest = steps[0] / 2, 1.0
    pairs = sorted({number for _, _, number, _ in lines})
    for name, colour, number, line in lines:
        shares = [checkpoint.harmful.count / base for checkpoint in line.checkpoints]
        highest = max(highest, *shares)
        axes.plot(
            [checkpoint.steps or start for checkpoint in line.checkpoints],
            shares,
            _DASHES[pairs.index(number) % len(_DASHES)],
            color=PALETTE[colour],
            linewidth=1.6,
            marker="o",
            markersize=4,
            label=f"{drawable(name, 24)}, {pairs_text(number)}",
        )
    axes.axhline(0.5, color=PALETTE["muted"], linewidth=0.9)
    axes.set_xscale("log", base=2)
    axes.set_xlim(start / 1.2, steps[-1] * 1.2)
    axes.xaxis.set_major_locator(FixedLocator([start, *steps]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: "0" if value == start else f"{value:.0f}")
    share_axis(axes, "y")
    axes.set_ylim(-0.02, highest + 0.02)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("of the base's harm back")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=9)
