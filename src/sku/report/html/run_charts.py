"""Pictures of how a result came about: training curves, the task vector, the sweep of its alphas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import matplotlib
from matplotlib.axes import Axes

from sku.evaluate.metrics import Rate
from sku.report.facts import TaskVectorFacts
from sku.report.figures import light
from sku.report.html.drawing import STYLE, Picture, drawable, name_rows, new_figure
from sku.report.html.result_charts import ratio_axis, tokens_text
from sku.report.read_run import RecordedSweep
from sku.report.robustness import rate_text
from sku.report.tables import NOTHING
from sku.sweep.rule import Replies, SweepPoint

_LARGEST_RATIO = 3.0
"""Points beyond it stand in the table alone: a ruined model would press all others together."""
_SHARES: dict[str, tuple[str, str, Any]] = {
    "harmful": ("harmful", "harm", "-"),
    "prefill": ("harmful, worst prefill", "second", (0, (5, 2))),
    "gibberish": ("gibberish", "base", (0, (1.4, 1.4))),
    "over_refusal": ("normal prompts refused", "fourth", (0, (5, 1.4, 1.4, 1.4))),
}
"""Measure of a point -> its words, colour and dashes."""
_LINES = ("unlearned", "harm", "second", "third", "fourth")
_TABLE_ROWS = 12
"""Of the table under the training curves: about so many steps, first and last among them."""


def training_chart(log: Sequence[Mapping[str, float]]) -> Picture:
    """Every loss term over the steps, a panel each, since their units and sizes differ.

    Args:
        log: Logged steps; at least one.
    """
    terms = sorted({name for entry in log for name in entry if name.startswith("loss")})  # "loss" is the first.
    words = {name: name.partition("/")[2].replace("_", " ") or "whole objective" for name in terms}
    with matplotlib.rc_context(cast(Any, STYLE)):
        figure, panels = new_figure(0.35 + 1.2 * len(terms), len(terms))
        for number, (axes, term) in enumerate(zip(panels, terms, strict=True)):
            points = [(entry["step"], entry[term]) for entry in log if term in entry]
            steps, values = zip(*points, strict=True)
            colour = light(_LINES[number % len(_LINES)])
            axes.plot(steps, values, color=colour, linewidth=1.6, marker="o" if len(points) == 1 else "")
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
    groups = {title: dict(sorted(norms.items(), key=_by_number)) for title, norms in groups.items()}
    sizes = [max(len(norms), 2) for norms in groups.values()]
    with matplotlib.rc_context(cast(Any, STYLE)):
        figure, panels = new_figure(0.5 * len(sizes) + 0.22 * sum(sizes), len(groups))
        cast(Any, panels[0].get_gridspec()).set_height_ratios(sizes)
        for axes, (title, norms) in zip(panels, groups.items(), strict=True):
            axes.barh(range(len(norms)), list(norms.values()), height=0.72, color=light("unlearned"))
            name_rows(axes, list(norms))
            axes.set_title(f"by {title}", loc="left", fontsize=10, pad=4)
            axes.sharex(panels[0])
        panels[-1].set_xlabel("Euclidean norm")
    return Picture(
        name="task_vector",
        title="Where the task vector is long",
        caption="Euclidean norm of what stage 1 changed and stage 2 subtracts. Others are weights of no decoder "
        "layer, such as embeddings.",
        figure=figure,
        columns=("by", "name", "norm"),
        rows=tuple((title, name, f"{norm:.4g}") for title, norms in groups.items() for name, norm in norms.items()),
    )


def _by_number(entry: tuple[str, float]) -> tuple[bool, int, str]:
    """Layers by their number, names after them in alphabetical order, what belongs to none at the end."""
    name = entry[0]
    return not name.isdecimal(), int(name) if name.isdecimal() else int(name == "others"), name


def sweep_chart(sweep: RecordedSweep) -> Picture:
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


def _draw_shares(axes: Axes, sweep: RecordedSweep) -> None:
    measured = [(point.alpha, point.replies) for point in sweep.points if point.replies is not None]
    for name, (words, colour, dashes) in _SHARES.items():
        found = [(alpha, rate) for alpha, replies in measured if (rate := _share(replies, name)) is not None]
        alphas, rates = [alpha for alpha, _ in found], [rate for _, rate in found]
        axes.plot(
            alphas, [rate.value for rate in rates], color=light(colour), linestyle=dashes, marker="o", markersize=4,
            label=words,
        )  # fmt: skip
        axes.vlines(
            alphas, [rate.low for rate in rates], [rate.high for rate in rates], color=light(colour), linewidth=1
        )
    if sweep.pick.alpha is not None:
        axes.axvline(sweep.pick.alpha, color=light("ink"), linewidth=1, linestyle=(0, (2, 2)))
    _share_axis(axes)
    axes.set_xlabel("alpha")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.24), ncols=2, fontsize=9)


def _share(replies: Replies, name: str) -> Rate | None:
    """A measure of ``_SHARES``; of several prefills the rate after the worst."""
    tokens = _worst_prefill(replies)
    prefilled = None if tokens is None else replies.prefill[tokens]
    return {
        "harmful": replies.harmful, "prefill": prefilled, "gibberish": replies.gibberish,
        "over_refusal": replies.over_refusal,
    }[name]  # fmt: skip


def _worst_prefill(replies: Replies) -> int | None:
    return max(replies.prefill, key=lambda tokens: (replies.prefill[tokens].value, -tokens), default=None)


def _draw_frontier(axes: Axes, sweep: RecordedSweep) -> None:
    points = [
        (point.alpha, point.perplexity, point.replies.harm[1])
        for point in sweep.points
        if point.perplexity is not None and point.replies is not None and point.perplexity.value <= _LARGEST_RATIO
    ]
    ratios = [ratio.value for _, ratio, _ in points]
    axes.set_xscale("log")
    axes.plot(ratios, [worst.value for _, _, worst in points], color=light("unlearned"), marker="o", markersize=4)
    for alpha, ratio, worst in points:
        axes.vlines(ratio.value, worst.low, worst.high, color=light("unlearned"), linewidth=1)
        axes.hlines(worst.value, ratio.low, ratio.high, color=light("unlearned"), linewidth=1)
        if alpha == sweep.pick.alpha:
            axes.plot(ratio.value, worst.value, "*", color=light("harm"), markersize=14, zorder=4)
    ratio_axis(axes, [1.0, *(value for _, ratio, _ in points for value in (ratio.value, ratio.low, ratio.high))])
    _share_axis(axes)
    axes.set_xlabel("perplexity of normal answers, to the base's")
    axes.set_ylabel("harmful")


def _share_axis(axes: Axes) -> None:
    axes.set_ylim(-0.04, 1.04)
    axes.set_yticks([0, 0.5, 1], ["0", "50", "100 %"])
    axes.grid(axis="y", color=light("faint"), linewidth=0.7)


def _table_row(point: SweepPoint, sweep: RecordedSweep) -> tuple[str, ...]:
    replies, ratio = point.replies, point.perplexity
    shares = [rate_text(None if replies is None else _share(replies, name)) for name in _SHARES]
    shares[1] += tokens_text(None if replies is None else _worst_prefill(replies))
    return (
        f"{point.alpha:g}",
        *shares,
        NOTHING if ratio is None else f"\u00d7{ratio.value:.4g} ({ratio.low:.4g} to {ratio.high:.4g})",
        ("picked" if sweep.pick.met else "nearest") if point.alpha == sweep.pick.alpha else point.unasked,
    )
