"""Pictures of how a result came about: training curves, the task vector, rounded weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import matplotlib

from sku.evaluate.metrics import Rate
from sku.report.html.drawing import STYLE, Picture, add_legend, drawable, name_rows, new_figure, share_axis
from sku.report.html.palette import light
from sku.report.html.precisions_file import PrecisionRow
from sku.report.html.task_vector_facts import TaskVectorFacts
from sku.report.tables import interval, percent

NOTHING = "\u2013"
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


def precision_chart(rows: Sequence[PrecisionRow]) -> Picture:
    """Harmful shares of the unlearned model at each precision."""
    marks = (("unlearned", "harmful", -0.14), ("second", "harmful, worst prefill", 0.14))
    with matplotlib.rc_context(cast(Any, STYLE)):
        figure, (axes,) = new_figure(0.95 + 0.42 * len(rows))
        for place, row in enumerate(rows):
            for (colour, _, offset), rate in zip(marks, (row.harmful, row.forced), strict=True):
                if rate is not None:
                    y = place + offset
                    axes.plot([rate.low, rate.high], [y, y], color=light(colour), linewidth=1.8)
                    axes.plot(rate.value, y, "o", color=light(colour), markersize=6)
        name_rows(axes, [row.precision for row in rows])
        share_axis(axes)
        add_legend(axes, [(light(colour), light(colour), words) for colour, words, _ in marks])
    return Picture(
        name="precisions",
        title="Harmful replies once the weights are rounded",
        caption="Dots are shares of replies to harmful prompts, lines their 95 % intervals. Kept is the length that "
        "the change of unlearning still has along itself.",
        figure=figure,
        columns=("precision", "harmful", "worst prefill", "gibberish", "perplexity, to base", "kept", "harm returns"),
        rows=tuple(
            (
                row.precision,
                rate_text(row.harmful),
                rate_text(row.forced) + tokens_text(row.forced_tokens),
                rate_text(row.degenerate),
                NOTHING if row.perplexity is None else f"\u00d7{row.perplexity.ratio:.4g}",
                NOTHING if row.kept is None else percent(row.kept),
                "yes" if row.brings_back else "",
            )
            for row in rows
        ),
    )


def rate_text(rate: Rate | None) -> str:
    """A share with its interval, a dash for none."""
    return NOTHING if rate is None else f"{percent(rate.value)} ({interval(rate)})"


def tokens_text(tokens: int | None) -> str:
    """Length of a prefill behind its rate: ``, 3 tokens``."""
    return "" if tokens is None else f", {tokens} token{'' if tokens == 1 else 's'}"
