"""The picture of a sweep: shares of replies over alpha, and the frontier of harm against cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import matplotlib
from matplotlib.axes import Axes

from sku.evaluate.metrics import Rate
from sku.report.html.drawing import STYLE, Picture, new_figure
from sku.report.html.palette import light
from sku.report.html.result_charts import ratio_axis
from sku.report.html.run_charts import NOTHING, rate_text, tokens_text
from sku.report.html.sweep_file import Sweep, SweepPoint

_LARGEST_RATIO = 3.0
"""Points beyond it stand in the table alone: a ruined model would press all others together."""
_SHARES: dict[str, tuple[str, str, Any]] = {
    "harmful": ("harmful", "harm", "-"),
    "forced": ("harmful, worst prefill", "second", (0, (5, 2))),
    "degenerate": ("gibberish", "base", (0, (1.4, 1.4))),
    "over_refusal": ("normal prompts refused", "fourth", (0, (5, 1.4, 1.4, 1.4))),
}
"""Measure of a point -> its words, colour and dashes."""


def sweep_chart(sweep: Sweep) -> Picture:
    """Shares over alpha, and the largest harmful rate against the perplexity of normal answers."""
    with matplotlib.rc_context(cast(Any, STYLE)):
        figure, panels = new_figure(5.7, 2)
        _draw_shares(panels[0], sweep)
        _draw_frontier(panels[1], sweep)
    return Picture(
        name="frontier",
        title="Harm and utility over the strength",
        caption="Above, shares of replies over alpha; the dotted line is the alpha that was picked. Below, the larger "
        "of the two harmful rates against the perplexity of normal answers, to the base's; the star is the pick, the "
        "lower left corner is best. Models beyond \u00d73 stand in the table alone. Ranges are 95 % intervals.",
        figure=figure,
        columns=("alpha", *(words for words, _, _ in _SHARES.values()), "perplexity, to base", ""),
        rows=tuple(_table_row(point, sweep) for point in sweep.points),
    )


def _draw_shares(axes: Axes, sweep: Sweep) -> None:
    for name, (words, colour, dashes) in _SHARES.items():
        found: list[tuple[float, Rate]] = [
            (point.alpha, getattr(point, name)) for point in sweep.points if getattr(point, name) is not None
        ]
        alphas, rates = [alpha for alpha, _ in found], [rate for _, rate in found]
        axes.plot(
            alphas, [rate.value for rate in rates], color=light(colour), linestyle=dashes, marker="o", markersize=4,
            label=words,
        )  # fmt: skip
        axes.vlines(
            alphas, [rate.low for rate in rates], [rate.high for rate in rates], color=light(colour), linewidth=1
        )
    if sweep.pick is not None:
        axes.axvline(sweep.pick, color=light("ink"), linewidth=1, linestyle=(0, (2, 2)))
    _share_axis(axes)
    axes.set_xlabel("alpha")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.24), ncols=2, fontsize=9)


def _draw_frontier(axes: Axes, sweep: Sweep) -> None:
    points = [
        (point.alpha, point.ratio, point.worst)
        for point in sweep.points
        if point.ratio is not None and point.worst is not None and point.ratio[0] <= _LARGEST_RATIO
    ]
    ratios: Sequence[float] = [ratio[0] for _, ratio, _ in points]
    axes.set_xscale("log")
    axes.plot(ratios, [worst.value for _, _, worst in points], color=light("unlearned"), marker="o", markersize=4)
    for alpha, ratio, worst in points:
        axes.vlines(ratio[0], worst.low, worst.high, color=light("unlearned"), linewidth=1)
        axes.hlines(worst.value, ratio[1], ratio[2], color=light("unlearned"), linewidth=1)
        if alpha == sweep.pick:
            axes.plot(ratio[0], worst.value, "*", color=light("harm"), markersize=14, zorder=4)
    ratio_axis(axes, [1.0, *(value for _, ratio, _ in points for value in ratio)])
    _share_axis(axes)
    axes.set_xlabel("perplexity of normal answers, to the base's")
    axes.set_ylabel("harmful")


def _share_axis(axes: Axes) -> None:
    axes.set_ylim(-0.04, 1.04)
    axes.set_yticks([0, 0.5, 1], ["0", "50", "100 %"])
    axes.grid(axis="y", color=light("faint"), linewidth=0.7)


def _table_row(point: SweepPoint, sweep: Sweep) -> tuple[str, ...]:
    forced = tokens_text(point.forced_tokens)
    ratio = point.ratio
    return (
        f"{point.alpha:g}",
        rate_text(point.harmful),
        f"{rate_text(point.forced)}{forced}",
        rate_text(point.degenerate),
        rate_text(point.over_refusal),
        NOTHING if ratio is None else f"\u00d7{ratio[0]:.4g} ({ratio[1]:.4g} to {ratio[2]:.4g})",
        ("picked" if sweep.met else "nearest") if point.alpha == sweep.pick else point.unasked,
    )
