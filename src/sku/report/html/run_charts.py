"""Pictures of how a result came about: training curves, the task vector, strengths, number formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import matplotlib

from sku.report.html.drawing import STYLE, Picture, drawable, name_rows, new_figure, share_axis
from sku.report.html.palette import light
from sku.report.html.precisions_file import PrecisionRow
from sku.report.html.result_charts import ratio_axis
from sku.report.html.sweep_file import Sweep
from sku.report.html.task_vector_facts import TaskVectorFacts
from sku.report.tables import percent

NOTHING = "\u2013"
_LINES = ("unlearned", "harm", "second", "third", "fourth")
_TABLE_ROWS = 12
"""Of the table under the training curves: so many steps, first and last among them."""
_SHARES = {
    "harmful": ("harmful", "harm", "-"),
    "forced": ("harmful, forced start", "second", (0, (5, 2))),
    "degenerate": ("gibberish", "base", (0, (1.4, 1.4))),
    "over_refusal": ("normal prompts refused", "fourth", (0, (5, 1.4, 1.4, 1.4))),
}
"""Measure of a point -> its words, colour and dashes."""


def training_chart(log: Sequence[Mapping[str, float]]) -> Picture:
    """Every loss term over the steps, a panel each, since their units and sizes differ.

    Args:
        log: Logged steps; at least one.
    """
    terms = sorted({name for entry in log for name in entry if name.startswith("loss")}, key=lambda name: (name != "loss", name))
    words = {name: "whole objective" if name == "loss" else name.partition("/")[2].replace("_", " ") for name in terms}
    with matplotlib.rc_context(cast(Any, STYLE)):
        figure, panels = new_figure(0.35 + 1.2 * len(terms), len(terms))
        for number, (axes, term) in enumerate(zip(panels, terms, strict=True)):
            points = [(entry["step"], entry[term]) for entry in log if term in entry]
            colour = light(_LINES[number % len(_LINES)])
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.6, marker="o" if len(points) == 1 else "")
            axes.set_title(drawable(words[term]), loc="left", fontsize=10, pad=4)
            axes.grid(axis="y", color=light("faint"), linewidth=0.7)
            axes.sharex(panels[0])
            axes.tick_params(labelbottom=axes is panels[-1])
        panels[-1].set_xlabel("optimizer step")
    stride = max(1, -(-len(log) // _TABLE_ROWS))
    kept = [*log[::stride], *([log[-1]] if (len(log) - 1) % stride else [])]
    return Picture(
        name="training",
        title="Loss terms in training",
        caption="Each term as it was logged, before its weight, in nats per token where it is a cross-entropy or a "
        "divergence; the whole objective is their weighted sum.",
        figure=figure,
        columns=("step", *(words[term] for term in terms)),
        rows=tuple(
            (f"{entry['step']:.0f}", *(f"{entry[term]:.4g}" if term in entry else NOTHING for term in terms))
            for entry in kept
        ),
    )


def vector_chart(vector: TaskVectorFacts) -> Picture:
    """Euclidean norm of the task vector by layer and by kind of module."""
    groups = {"decoder layer": vector.layers, "kind of module": vector.modules}
    groups = {title: dict(sorted(norms.items(), key=_by_number)) for title, norms in groups.items() if norms}
    sizes = [max(len(norms), 2) for norms in groups.values()]
    with matplotlib.rc_context(cast(Any, STYLE)):
        figure, panels = new_figure(0.5 * len(sizes) + 0.22 * sum(sizes), len(groups))
        panels[0].get_gridspec().set_height_ratios(sizes)
        for axes, (title, norms) in zip(panels, groups.items(), strict=True):
            axes.barh(range(len(norms)), list(norms.values()), height=0.72, color=light("unlearned"))
            name_rows(axes, list(norms))
            axes.set_title(f"by {title}", loc="left", fontsize=10, pad=4)
            axes.sharex(panels[0])
        panels[-1].set_xlabel("Euclidean norm")
    return Picture(
        name="task_vector",
        title="Where the task vector is long",
        caption="Euclidean norm of what stage 1 changed and stage 2 subtracts. Others are weights of no decoder layer, "
        "such as embeddings.",
        figure=figure,
        columns=("by", "name", "norm"),
        rows=tuple((title, name, f"{norm:.4g}") for title, norms in groups.items() for name, norm in norms.items()),
    )


def _by_number(entry: tuple[str, float]) -> tuple[int, int, str]:
    """Layers by their number, names after them in alphabetical order."""
    name = entry[0]
    return (0, int(name), "") if name.isdecimal() else (1, 0, name)


def sweep_chart(sweep: Sweep) -> Picture:
    """Shares over the strength, and harm against the cost on normal answers."""
    points = sweep.points
    priced = [(point.perplexity_ratio, point) for point in points if point.perplexity_ratio is not None]
    with matplotlib.rc_context(cast(Any, STYLE)):
        figure, panels = new_figure(3.1 + (2.4 if priced else 0), 2 if priced else 1)
        axes = panels[0]
        for name, (words, colour, dashes) in _SHARES.items():
            line = [(point.alpha, getattr(point, name)) for point in points if getattr(point, name) is not None]
            if line:
                axes.plot(
                    *zip(*line, strict=True), color=light(colour), linestyle=dashes, marker="o", markersize=4, label=words
                )  # fmt: skip
        if sweep.pick is not None:
            axes.axvline(sweep.pick, color=light("ink"), linewidth=1, linestyle=(0, (2, 2)))
        axes.set_ylim(-0.04, 1.04)
        axes.set_yticks([0, 0.5, 1], ["0", "50", "100 %"])
        axes.set_xlabel("alpha")
        axes.grid(axis="y", color=light("faint"), linewidth=0.7)
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.24), ncols=2, fontsize=9)
        if priced:
            _draw_frontier(panels[1], [(ratio, point.harmful, point.alpha) for ratio, point in priced], sweep.pick)
    return Picture(
        name="frontier",
        title="Harm and utility over the strength",
        caption="Above, shares of replies over alpha; the dotted line is the alpha that was picked. Below, harmful "
        "replies against the perplexity of normal answers, unlearned / base; the lower left corner is best.",
        figure=figure,
        columns=("alpha", *(words for words, _, _ in _SHARES.values()), "perplexity ratio", "picked"),
        rows=tuple(
            (
                f"{point.alpha:g}",
                *(share_text(getattr(point, name)) for name in _SHARES),
                ratio_text(point.perplexity_ratio),
                "yes" if point.alpha == sweep.pick else "",
            )
            for point in points
        ),
    )


def _draw_frontier(axes: Any, points: Sequence[tuple[float, float | None, float]], pick: float | None) -> None:
    line = [(ratio, harmful, alpha) for ratio, harmful, alpha in points if harmful is not None]
    axes.set_xscale("log")
    axes.plot([ratio for ratio, _, _ in line], [harmful for _, harmful, _ in line], color=light("unlearned"), marker="o", markersize=4)
    for ratio, harmful, alpha in line:
        if alpha == pick:
            axes.plot(ratio, harmful, "*", color=light("harm"), markersize=13)
    ratio_axis(axes, [ratio for ratio, _, _ in line] or [1.0])
    axes.set_ylim(-0.04, 1.04)
    axes.set_yticks([0, 0.5, 1], ["0", "50", "100 %"])
    axes.set_xlabel("perplexity of normal answers, unlearned / base")
    axes.set_ylabel("harmful")
    axes.grid(color=light("faint"), linewidth=0.7)


def precision_chart(rows: Sequence[PrecisionRow]) -> Picture:
    """Harmful shares of the unlearned model in each number format."""
    with matplotlib.rc_context(cast(Any, STYLE)):
        figure, (axes,) = new_figure(0.95 + 0.42 * len(rows))
        for place, row in enumerate(rows):
            if row.harmful_bounds is not None:
                axes.plot(row.harmful_bounds, [place] * 2, color=light("unlearned"), linewidth=1.8)
            for value, marker, colour in ((row.harmful, "o", "unlearned"), (row.forced, "D", "second")):
                if value is not None:
                    axes.plot(value, place, marker, color=light(colour), markersize=6)
        for marker, colour, words in (("o", "unlearned", "harmful"), ("D", "second", "harmful, forced start")):
            axes.plot([], [], marker, color=light(colour), label=words)
        name_rows(axes, [row.precision for row in rows])
        share_axis(axes)
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.5 / figure.get_size_inches()[1]), ncols=2)
    return Picture(
        name="precisions",
        title="Harmful replies by number format",
        caption="The unlearned model with its weights rounded to each format; lines are 95 % intervals where they "
        "were recorded.",
        figure=figure,
        columns=("format", "harmful", "95 %", "forced start", "gibberish", "perplexity ratio"),
        rows=tuple(
            (
                row.precision,
                share_text(row.harmful),
                NOTHING if row.harmful_bounds is None else "{:.1f} to {:.1f}".format(*(100 * b for b in row.harmful_bounds)),
                share_text(row.forced),
                share_text(row.degenerate),
                ratio_text(row.perplexity_ratio),
            )
            for row in rows
        ),
    )


def share_text(value: float | None) -> str:
    """A share in per cent, a dash for none."""
    return NOTHING if value is None else percent(value)


def ratio_text(value: float | None) -> str:
    """A ratio, a dash for none."""
    return NOTHING if value is None else f"\u00d7{value:.4g}"
