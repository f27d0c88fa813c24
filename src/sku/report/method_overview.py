"""The overview picture: one row per method, one column per measure, to be understood at a glance.

A dot is a method at the strength chosen within the utility budget, with the 95 % intervals of the tables.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sku.errors import EvaluationError
from sku.evaluate.metrics import HARM_WORDS, prefill_words
from sku.evaluate.statistics import Estimate
from sku.report.figures import PALETTE, STYLE, ratio_ticks, save_figure
from sku.report.method_records import MethodRecord, points_of
from sku.report.method_tables import (
    REFERENCE,
    ComparisonRow,
    comparison_rows,
    deciding_hit,
    judge_sentence,
    prefills_tried,
    prompts_asked,
    ratio_text,
)
from sku.report.words import NOTHING

METHOD, CONTROL = PALETTE["refusal"], PALETTE["base"]
"""Colours of the rows."""
_LEAST, _WIDEST = 0.9, 2.0
"""Ends of the perplexity axis, unless a ratio lies below; what lies beyond x2 is told by a number."""
_NEAR_TICKS, _FAR_TICKS = (0.9, 1, 1.1, 1.2, 1.3), (0.25, 0.5, 0.75, 1, 1.4, 2)


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


def overview_figure(records: Sequence[MethodRecord], path: Path) -> Path:
    """Draws a row per method and a column per measure.

    A measure that no row has is left out; over-refusal stands in for exact answers where these were not asked or no
    row gave one.

    Raises:
        EvaluationError: Nothing to draw.
        OutputError: Another suffix than ``.png``, ``.svg`` or ``.pdf``, or a folder that can't be written.
    """
    rows = comparison_rows(records)
    tried = prefills_tried(points_of(records))
    measures = _measures_of(rows, tried, deciding_hit(records))
    if not measures:
        raise EvaluationError("no complete record has a rate or a perplexity ratio: nothing to draw")
    with matplotlib.rc_context(STYLE):
        longest = max(len(row.title) for row in rows)
        size = (0.5 + 0.075 * longest + 1.85 * len(measures), 1.9 + 0.34 * len(rows))
        figure = Figure(figsize=size, layout="constrained")
        all_axes = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
        for axes, measure in zip(all_axes, measures, strict=True):
            draw_measure(axes, measure, rows)
        all_axes[0].set_yticks(range(len(rows)), [row.title for row in rows])
        for label, row in zip(all_axes[0].get_yticklabels(), rows, strict=True):
            label.set(color=CONTROL if row.control else METHOD if row.name == REFERENCE else STYLE["text.color"])
            label.set(fontweight="bold" if row.name == REFERENCE else "normal", fontsize=9.5)
        footer = textwrap.fill(_footer(records, rows, measures, tried), 32 * len(measures))
        figure.supxlabel(footer, fontsize=7.5, color=CONTROL, multialignment="center")
        return save_figure(figure, path)


def _measures_of(rows: Sequence[ComparisonRow], tried: Collection[str], hit: str) -> list[Measure]:
    """Those that some row has, and of exact answers and over-refusal only one.

    Exact answers say nothing where no row gives any, as with references that nobody repeats word for word.
    """
    exact = any(row.estimates["exact_answers"].value for row in rows if "exact_answers" in row.estimates)
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
    return [measure for measure in every if any(measure.field in row.estimates for row in rows)]


def _footer(
    records: Sequence[MethodRecord], rows: Sequence[ComparisonRow], measures: Sequence[Measure], tried: Collection[str]
) -> str:
    seeds = len({record.seed for record in records if record.failure is None})
    # Seeds that failed, and seeds without a strength within the budget, have a reason behind their number.
    missing = [row for row in rows if " " in row.seeds and not row.failed]
    unmeasured = any(not row.failed and measure.field not in row.estimates for row in rows for measure in measures)
    sentences = [
        f"Means over {seeds} seeds, 95 % intervals over seeds and prompts." if seeds > 1 else
        "One seed, 95 % intervals over prompts.",
        f"{', '.join(prompts_asked(points_of(records)[0]))}.",
        "After a prefill each dot stands at the one that is the worst for it." if len(tried) > 1 else "",
        "Grey: controls." if any(row.control for row in rows) else "",
        "; ".join(f"{row.title}: {row.seeds}" for row in missing) + "." if missing else "",
        f"{NOTHING}: not measured." if unmeasured else "",
        judge_sentence(records),
    ]  # fmt: skip
    return " ".join(sentence for sentence in sentences if sentence)


def draw_measure(axes: Axes, measure: Measure, rows: Sequence[ComparisonRow]) -> None:
    """Draws one column: row i at height i, from the top, controls last."""
    _set_height(axes, rows)
    goal = "\u2190 lower is better" if measure.better == "lower" else "higher is better \u2192"
    axes.set_title(measure.title, loc="left", fontsize=10, fontweight="bold", pad=28)
    axes.annotate(
        f"{measure.of}\n{goal}", (0, 1), xytext=(0, 4), xycoords="axes fraction", textcoords="offset points",
        va="bottom", fontsize=8, color=CONTROL,
    )  # fmt: skip
    if measure.ratio:
        _set_ratio_axis(axes, [row.estimates[measure.field] for row in rows if measure.field in row.estimates])
    else:
        axes.set_xlim(-3, 103)
        axes.set_xticks([0, 25, 50, 75, 100], ["0", "", "50", "", "100 %"])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color=PALETTE["faint"], linewidth=0.7)
    axes.set_axisbelow(True)
    for height, row in enumerate(rows):
        if measure.field in row.estimates:
            colour = CONTROL if row.control else METHOD
            _draw_dot(axes, height, row.estimates[measure.field], colour, measure.ratio)
        else:
            words = "failed" if row.failed else NOTHING
            axes.text(
                0.5, height, words, ha="center", va="center", transform=axes.get_yaxis_transform(), color=CONTROL,
                fontsize=8, fontstyle="italic",
            )  # fmt: skip


def _set_height(axes: Axes, rows: Sequence[ComparisonRow]) -> None:
    """Bands that lead the eye along the rows, and a line above the first control."""
    axes.set_ylim(len(rows) - 0.45, -0.55)
    for height in range(0, len(rows), 2):
        axes.axhspan(height - 0.5, height + 0.5, color=PALETTE["band"], linewidth=0, zorder=0)
    for height, (above, below) in enumerate(pairwise(rows)):
        if below.control and not above.control:
            axes.axhline(height + 0.5, color=PALETTE["ink"], linewidth=0.8, zorder=1)


def _set_ratio_axis(axes: Axes, estimates: Sequence[Estimate]) -> None:
    values = [value for estimate in estimates for value in (estimate.value, estimate.low, estimate.high)]
    left, right = min(_LEAST, *(value / 1.04 for value in values)), min(_WIDEST, max(1.25, *values))
    ticks = _NEAR_TICKS if right < 1.35 and left > 0.8 else _FAR_TICKS
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.axvline(1, color=PALETTE["ink"], linewidth=0.8, zorder=1)
    ratio_ticks(axes, [tick for tick in ticks if left <= tick <= right])


def _draw_dot(axes: Axes, height: float, estimate: Estimate, colour: str, ratio: bool) -> None:
    scale = 1 if ratio else 100
    value, low, high = (scale * number for number in (estimate.value, estimate.low, estimate.high))
    right = max(axes.get_xlim())
    axes.plot(
        [min(low, right), min(high, right)], [height] * 2, color=colour, linewidth=1.6, solid_capstyle="butt", zorder=3
    )
    beyond = value > right
    mark = ">" if beyond else "o"
    axes.plot(min(value, right), height, mark, color=colour, markersize=6, clip_on=False, zorder=4)
    if beyond:
        axes.annotate(
            f"\u00d7{ratio_text(value)}", (right, height), xytext=(6, 0), textcoords="offset points",
            va="center_baseline", fontsize=7, color=colour, annotation_clip=False,
        )  # fmt: skip
