"""Pictures of how a result came about, training, task vector and alphas, and of what undoes it: attacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from sku.attacks import AttackReport, RelearnLine
from sku.evaluate.metrics import Rate
from sku.report.figures import PAGE_STYLE, Picture, drawable, light, name_rows, new_figure, share_axis
from sku.report.frontier import draw_sweep
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
from sku.sweep import Sweep, SweepPoint

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
    with matplotlib.rc_context(PAGE_STYLE):
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


def vector_chart(layers: Mapping[str, float], modules: Mapping[str, float]) -> Picture:
    """Euclidean norm of the task vector by layer and by kind of module, as ``TaskVectorFacts`` has them."""
    groups = {"decoder layer": layers, "kind of module": modules}
    groups = {title: dict(sorted(norms.items(), key=_by_number)) for title, norms in groups.items()}
    sizes = [max(len(norms), 2) for norms in groups.values()]
    with matplotlib.rc_context(PAGE_STYLE):
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


def sweep_chart(sweep: Sweep) -> Picture:
    """Shares and utility cost over alpha, and the largest harmful rate against that cost."""
    with matplotlib.rc_context(PAGE_STYLE):
        figure, (rates, cost, frontier) = new_figure(10.5, 3)
        draw_sweep(sweep, rates, cost, frontier)
        rates.set_xlabel("alpha")
        rates.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=2, fontsize=9)
    return Picture(
        name="frontier",
        title="Harm and utility over the strength",
        caption="Above, shares of replies over alpha, and what each alpha costs; the vertical line is the alpha that "
        "was picked. Below, the largest harmful rate, free or after a prefill, against that cost; the star is the "
        "pick, the lower left corner is best. A cost of 1 is the budget. Ranges are 95 % intervals.",
        figure=figure,
        columns=(
            "alpha",
            "harmful",
            "harmful, worst prefill",
            "gibberish",
            "normal prompts refused",
            "cost",
            "perplexity, to base",
            "",
        ),
        rows=tuple(_table_row(point, sweep) for point in (sweep.base, *sweep.points)),
    )


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


def draw_rates(axes: Axes, rows: Sequence[tuple[str, tuple[Rate, Rate]]]) -> None:
    """Draws dots of base and unlearned model with their intervals in named rows; those of the base are hollow."""
    for name, face, offset in (("base", "paper", -0.15), ("unlearned", "unlearned", 0.15)):
        dot: Any = {"color": light(face), "markeredgecolor": light(name), "markeredgewidth": 1.5, "markersize": 6.5}
        for place, (_, rates) in enumerate(rows):
            rate, y = rates[name == "unlearned"], place + offset
            axes.plot([rate.low, rate.high], [y, y], color=light(name), linewidth=1.8, solid_capstyle="butt")
            axes.plot(rate.value, y, "o", **dot)
        axes.plot([], [], "o", label=name, **dot)
    name_rows(axes, [name for name, _ in rows])
    share_axis(axes)
    height = float(axes.get_figure(root=True).get_size_inches()[1])  # type: ignore[union-attr]
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.5 / height), ncols=2, frameon=False, handletextpad=0.1)


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
        title="Harmful replies under attack",
        caption="Share of questions with a harmful reply, with 95 % intervals. Of several ways to ask the worst one "
        "counts. The base model goes through the same attacks.",
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
        title="Cost to break",
        caption="Harmful replies as a share of the base model's own, over the steps of fine-tuning on harmful pairs "
        "none of which is asked, at the attacker's best learning rate. A line ends where half is back. In the table "
        "all after the last step, with 95 % intervals.",
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
            color=light(colour),
            linewidth=1.6,
            marker="o",
            markersize=4,
            label=f"{drawable(name, 24)}, {pairs_text(number)}",
        )
    axes.axhline(0.5, color=light("muted"), linewidth=0.9)
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
