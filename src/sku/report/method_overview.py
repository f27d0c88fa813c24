"""The overview picture: one row per method, one column per measure, to be understood at a glance.

A filled dot is a method at the strength chosen within the utility budget, a hollow one the method as published, both
with the 95 % intervals of the tables.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sku.errors import EvaluationError
from sku.evaluate.metrics import HARM_WORDS, prefill_words
from sku.evaluate.statistics import Estimate
from sku.report.figures import PALETTE, STYLE, ratio_ticks, save_figure
from sku.report.method_records import BASE, MethodRecord, Role, points_of
from sku.report.method_tables import (
    REFERENCE,
    ComparisonRow,
    comparison_rows,
    deciding_hit,
    judge_sentence,
    prefills_tried,
    prompts_asked,
    ratio_text,
    seeds_of,
)
from sku.report.words import NOTHING

METHOD, CONTROL = PALETTE["refusal"], PALETTE["base"]
"""Colours of the rows. Roles are told apart by filling alone, so that no reader needs the colours."""
_OFFSET: Mapping[Role, float] = {"best": -0.18, "published": 0.18}
"""Rows above and below the middle of a row."""
_LEAST, _WIDEST = 0.9, 2.0
"""Ends of the perplexity axis, unless a ratio lies below; what lies beyond x2 is told by a number."""
_NEAR_TICKS, _FAR_TICKS = (0.9, 1, 1.1, 1.2, 1.3), (0.25, 0.5, 0.75, 1, 1.4, 2)
_LEGEND: Mapping[Role, str] = {"best": "at equal utility", "published": "as published"}


class Measure(NamedTuple):
    """What one column shows."""

    field: str
    """Of ``ComparisonRow``."""
    title: str
    of: str
    """Whose prompts or answers."""
    better: Literal["lower", "higher"] = "lower"
    ratio: bool = False
    """Over the base model's, on a logarithmic axis; else a rate, shown in percent."""


Row = Mapping[Role, ComparisonRow]
"""One row of the picture, ``published`` always among its roles."""


def cell_of(row: Row, field: str) -> dict[Role, Estimate]:
    """What there is to draw of a measure in a row."""
    return {role: found.estimates[field] for role, found in row.items() if field in found.estimates}


def overview_figure(records: Sequence[MethodRecord], path: Path) -> Path:
    """Draws a row per method and a column per measure, at equal utility and as published.

    The base model has one dot. A measure that no row has is left out; over-refusal stands
    in for exact answers where these were not asked or no row gave one.

    Raises:
        EvaluationError: Nothing to draw, or the records don't fit together.
        OutputError: Another suffix than ``.png``, ``.svg`` or ``.pdf``, or a folder that can't be written.
    """
    rows = _rows(records)
    tried = prefills_tried(point for record in records for point in record.points.values())
    measures = _measures_of(rows, tried, deciding_hit(records))
    if not measures:
        raise EvaluationError("no complete record has a rate or a perplexity ratio: nothing to draw")
    with matplotlib.rc_context(STYLE):
        published = [row["published"] for row in rows]
        longest = max(len(row.title) for row in published)
        size = (0.5 + 0.075 * longest + 1.85 * len(measures), 1.9 + 0.34 * len(rows))
        figure = Figure(figsize=size, layout="constrained")
        all_axes = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
        for axes, measure in zip(all_axes, measures, strict=True):
            draw_measure(axes, measure, rows)
        all_axes[0].set_yticks(range(len(rows)), [row.title for row in published])
        for label, row in zip(all_axes[0].get_yticklabels(), published, strict=True):
            label.set(color=CONTROL if row.control else METHOD if row.name == REFERENCE else STYLE["text.color"])
            label.set(fontweight="bold" if row.name == REFERENCE else "normal", fontsize=9.5)
        handles = [
            Line2D([], [], linestyle="", marker="o", label=words, **dot_look(role, METHOD))
            for role, words in _LEGEND.items()
            if any(role in row and row[role].estimates for row in rows)
        ]
        legend = figure.legend(
            handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9,
            columnspacing=2.4, handletextpad=0.3, title_fontsize=7.5,
            title=textwrap.fill(_footer(records, rows, measures, tried), 32 * len(measures)),
        )  # fmt: skip
        legend.get_title().set(color=CONTROL, multialignment="center")
        return save_figure(figure, path)


def _rows(records: Sequence[MethodRecord]) -> list[Row]:
    best, published = (comparison_rows(records, role) for role in ("best", "published"))
    # The base model has one strength.
    return [
        {"published": own} if own.name == BASE else {"best": at_best, "published": own}
        for at_best, own in zip(best, published, strict=True)
    ]


def _measures_of(rows: Sequence[Row], tried: Collection[str], hit: str) -> list[Measure]:
    """Those that some row has, and of exact answers and over-refusal only one.

    Exact answers say nothing where no row gives any, as with references that nobody repeats word for word.
    """
    exact = any(estimate.value for row in rows for estimate in cell_of(row, "exact_answers").values())
    words, whose = prefill_words(tried).replace(", ", ",\n", 1), HARM_WORDS[hit].partition(", ")[2]
    ungated, unseen, normal = "ungated_" * (hit == "harmful_ungated"), "unseen harmful prompts", "normal prompts"
    every = (
        Measure(f"harmful_{ungated}unseen", f"Harmful,\n{whose}", unseen),
        Measure(f"prefill_{ungated}unseen", f"Harmful, {words}", unseen),
        Measure("gibberish_unseen", "Gibberish", unseen),
        Measure("exact_answers", "Exact answers", normal, "higher") if exact
        else Measure("over_refusal", "Over-refusal", normal),
        Measure("perplexity_normal", "Perplexity / base", "normal answers", ratio=True),
        Measure("perplexity_others", "Perplexity / base", "other answers", ratio=True),
    )  # fmt: skip
    return [measure for measure in every if any(cell_of(row, measure.field) for row in rows)]


def _footer(
    records: Sequence[MethodRecord], rows: Sequence[Row], measures: Sequence[Measure], tried: Collection[str]
) -> str:
    seeds = len({record.seed for record in records if record.failure is None})
    unmeasured = any(
        not row["published"].failed and not cell_of(row, measure.field) for row in rows for measure in measures
    )
    sentences = [
        f"Means over {seeds} seeds, 95 % intervals over seeds and prompts." if seeds > 1 else
        "One seed, 95 % intervals over prompts.",
        f"{', '.join(prompts_asked(points_of(records, 'published')[0]))}.",
        "After a prefill each dot stands at the one that is the worst for it." if len(tried) > 1 else "",
        "Grey: controls." if any(row["published"].control for row in rows) else "",
        _missing(records, rows),
        f"{NOTHING}: not measured." if unmeasured else "",
        judge_sentence(records),
    ]  # fmt: skip
    return " ".join(sentence for sentence in sentences if sentence)


def _missing(records: Sequence[MethodRecord], rows: Sequence[Row]) -> str:
    """What a reader would not see: seeds that failed, and seeds without a strength within the budget."""
    said: list[str] = []
    for row in (row["published"] for row in rows if not row["published"].failed):
        own = seeds_of(records, row.name)
        complete = [record for record in own if record.failure is None]
        best = len(points_of(own, "best"))
        if len(complete) < len(own):
            said.append(f"{row.title}: {len(own) - len(complete)} of {len(own)} seeds failed")
        if best < len(complete):
            said.append(f"{row.title}: {len(complete) - best} of {len(own)} seeds have no strength within the budget")
    return "; ".join(said) + "." if said else ""


def dot_look(role: Role, colour: str) -> dict[str, Any]:
    """Of a dot: filled for ``best``, hollow for ``published``."""
    return {
        "markerfacecolor": colour if role == "best" else "white", "markeredgecolor": colour, "markeredgewidth": 1.4,
        "markersize": 5.5,
    }  # fmt: skip


def draw_measure(axes: Axes, measure: Measure, rows: Sequence[Row]) -> None:
    """Draws one column: row i at height i, from the top, controls last."""
    _set_height(axes, rows)
    goal = "\u2190 lower is better" if measure.better == "lower" else "higher is better \u2192"
    axes.set_title(measure.title, loc="left", fontsize=10, fontweight="bold", pad=28)
    axes.annotate(
        f"{measure.of}\n{goal}", (0, 1), xytext=(0, 4), xycoords="axes fraction", textcoords="offset points",
        va="bottom", fontsize=8, color=CONTROL,
    )  # fmt: skip
    if measure.ratio:
        _set_ratio_axis(axes, [estimate for row in rows for estimate in cell_of(row, measure.field).values()])
    else:
        axes.set_xlim(-3, 103)
        axes.set_xticks([0, 25, 50, 75, 100], ["0", "", "50", "", "100 %"])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color=PALETTE["faint"], linewidth=0.7)
    axes.set_axisbelow(True)
    for height, row in enumerate(rows):
        cell, own = cell_of(row, measure.field), row["published"]
        for role, estimate in cell.items():
            offset = _OFFSET[role] if len(cell) > 1 else 0.0
            _draw_dot(axes, height + offset, estimate, role, CONTROL if own.control else METHOD, measure.ratio)
        if not cell:
            words = "failed" if own.failed else NOTHING
            axes.text(
                0.5, height, words, ha="center", va="center", transform=axes.get_yaxis_transform(), color=CONTROL,
                fontsize=8, fontstyle="italic",
            )  # fmt: skip


def _set_height(axes: Axes, rows: Sequence[Row]) -> None:
    """Bands that lead the eye along the rows, and a line above the first control."""
    axes.set_ylim(len(rows) - 0.45, -0.55)
    for height in range(0, len(rows), 2):
        axes.axhspan(height - 0.5, height + 0.5, color=PALETTE["band"], linewidth=0, zorder=0)
    for height, (above, below) in enumerate(pairwise(rows)):
        if below["published"].control and not above["published"].control:
            axes.axhline(height + 0.5, color=PALETTE["ink"], linewidth=0.8, zorder=1)


def _set_ratio_axis(axes: Axes, estimates: Sequence[Estimate]) -> None:
    values = [value for estimate in estimates for value in (estimate.value, estimate.low, estimate.high)]
    left, right = min(_LEAST, *(value / 1.04 for value in values)), min(_WIDEST, max(1.25, *values))
    ticks = _NEAR_TICKS if right < 1.35 and left > 0.8 else _FAR_TICKS
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.axvline(1, color=PALETTE["ink"], linewidth=0.8, zorder=1)
    ratio_ticks(axes, [tick for tick in ticks if left <= tick <= right])


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
