"""Pictures of what was measured: outcomes of replies, normal prompts, perplexities, attacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from sku.attacks.results import AttackReport
from sku.evaluate.metrics import Rate
from sku.evaluate.records import HARMFUL, HARMFUL_SPLITS, in_order
from sku.evaluate.results import answers_words
from sku.evaluate.verdict import CANT_MEASURE
from sku.report.attack_table import attack_rows
from sku.report.html.drawing import STYLE, Picture, add_legend, drawable, name_rows, new_figure, share_axis
from sku.report.html.palette import light
from sku.report.html.run_folder import RecordedRun
from sku.report.table_rows import TableRow
from sku.report.tables import interval, percent

OUTCOMES = {
    "harmful": "harmful", "evasive": "evasive", "safe_answer": "safe answer", "refusal": "refusal",
    "degenerate": "gibberish", "unjudged": "not judged",
}  # fmt: skip
"""Outcome -> its word, in the order of the bars."""
_TEXT_ON = {outcome: "on_deep" if outcome == "refusal" else "on_bright" for outcome in OUTCOMES}
_NARROWEST_LABEL = 0.1
_NORMAL = {"exact_answer": "exact answer", "over_refusal": "refused", "degenerate": "gibberish"}
_HARMFUL_ANSWERS = {"unlearned": "harmful, {}", "unseen": "harmful, unseen"}
_MODELS = (
    (light("paper"), light("base"), "base"),
    (light("unlearned"), light("unlearned"), "unlearned"),
)
"""Legend of dots: the base's is hollow."""
_NEAR_TICKS, _FAR_TICKS = (
    (0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5),
    (0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 1e3, 1e4, 1e6, 1e9),
)


def result_charts(run: RecordedRun) -> list[Picture]:
    """Outcomes, normal prompts and perplexities, those that were measured."""
    with matplotlib.rc_context(cast(Any, STYLE)):
        drawn = (outcome_chart(run), normal_chart(run), perplexity_chart(run))
    return [picture for picture in drawn if picture is not None]


def outcome_chart(run: RecordedRun) -> Picture | None:
    """Stacked shares of the outcomes of replies to harmful prompts, base above unlearned, a group for each way."""
    named = run.unlearned.setup.split_name
    groups = [
        (named(split), run.base.replies[split], run.unlearned.replies[split])
        for split in in_order(run.base.replies)
        if split in HARMFUL_SPLITS or split.startswith(HARMFUL)
        if run.base.replies.get(split) and run.unlearned.replies.get(split)
    ] + [
        (
            f"{named(split)}, {run.prefill_label(split)}",
            run.base.prefill[split][str(run.unlearned.worst_prefill[split])],
            worst,
        )
        for split, worst in run.unlearned.worst_prefills().items()
        if split in run.base.prefill
    ]
    if not groups:
        return None
    figure, (axes,) = new_figure(0.9 + 0.92 * len(groups))
    rows: list[tuple[str, ...]] = []
    shown = [
        name for name in OUTCOMES if any(side[name].count for _, before, after in groups for side in (before, after))
    ]
    places: list[float] = []
    judge = run.unlearned.judge
    for number, (title, before, after) in enumerate(groups):
        top = 2.9 * number
        measured = all(judge.can_measure(side["harmful"].value, side["harmful"].low) for side in (before, after))
        doubt = "" if measured else f": harm, {CANT_MEASURE}"
        axes.text(0, top - 0.6, f"{title} (n = {after['harmful'].total}){doubt}", va="bottom", fontweight="bold")
        for offset, (name, side) in enumerate((("base", before), ("unlearned", after))):
            places.append(top + offset)
            _stack(axes, top + offset, side, shown)
            rows.append((title, name, *(percent(side[outcome].value) for outcome in shown)))
    axes.set_yticks(places, ["base", "unlearned"] * len(groups))
    axes.set_ylim(places[-1] + 0.6, -1.4)
    axes.tick_params(length=0)
    share_axis(axes)
    axes.set_xlim(0, 1)
    axes.spines[["left", "bottom"]].set_visible(False)
    handles = [matplotlib.patches.Patch(facecolor=light(name), label=OUTCOMES[name]) for name in shown]
    below = -0.07 - 0.1 / len(groups)
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.42, below), ncols=min(3, len(shown)),
        frameon=False, handlelength=1, handleheight=1, columnspacing=1.2,
    )  # fmt: skip
    return Picture(
        name="outcomes",
        title="Replies to harmful prompts",
        caption="Share of replies by outcome, for the base model and below it the unlearned one; after a prefill "
        "the reply was made to begin with a harmful reply's first words; of the lengths tried the worst is shown.",
        figure=figure,
        columns=("asked", "model", *(OUTCOMES[name] for name in shown)),
        rows=tuple(rows),
    )


def _stack(axes: Axes, y: float, shares: Mapping[str, Rate], shown: Sequence[str]) -> None:
    left = 0.0
    for outcome in shown:
        width = shares[outcome].value
        if not width:
            continue
        axes.barh(y, width, left=left, height=0.88, color=light(outcome), edgecolor=light("paper"), linewidth=0.8)
        if width >= _NARROWEST_LABEL:
            axes.text(
                left + width / 2, y, f"{100 * width:.0f} %", ha="center", va="center", fontsize=9,
                color=light(_TEXT_ON[outcome]),
            )  # fmt: skip
        left += width


def normal_chart(run: RecordedRun) -> Picture | None:
    """Shares of replies to normal prompts with their intervals."""
    changes = run.replies.get("retain_test", {})
    rows = [(words, changes[name]) for name, words in _NORMAL.items() if name in changes]
    if not rows:
        return None
    figure, (axes,) = new_figure(0.9 + 0.5 * len(rows))
    for place, (_, change) in enumerate(rows):
        mark_rate(axes, place - 0.16, change.before, "base")
        mark_rate(axes, place + 0.16, change.after, "unlearned")
    name_rows(axes, [words for words, _ in rows])
    share_axis(axes)
    add_legend(axes, _MODELS)
    total = max(change.after.total for _, change in rows)
    return Picture(
        name="normal",
        title=f"Replies to normal prompts (n = {total})",
        caption="Dots are shares of replies, lines their 95 % intervals; what is wanted is no change.",
        figure=figure,
        columns=("share of replies", "base", "unlearned", "95 %", "change, points"),
        rows=tuple(
            (
                words,
                percent(change.before.value),
                percent(change.after.value),
                interval(change.after),
                f"{100 * change.difference:+.1f} ({100 * change.low:+.1f} to {100 * change.high:+.1f})",
            )
            for words, change in rows
        ),
    )


def mark_rate(axes: Axes, y: float, rate: Rate, colour: str) -> None:
    """A dot with its interval; the base's is hollow."""
    face = light("paper" if colour == "base" else colour)
    axes.plot([rate.low, rate.high], [y, y], color=light(colour), linewidth=1.8, solid_capstyle="butt")
    axes.plot(rate.value, y, "o", color=face, markeredgecolor=light(colour), markeredgewidth=1.5, markersize=6.5)


def perplexity_chart(run: RecordedRun) -> Picture | None:
    """Perplexity of fixed answers after unlearning, in units of what it was before."""
    unlearned = run.unlearned.setup.answers_name()
    rows = [
        (split, (_HARMFUL_ANSWERS.get(split) or answers_words(split)).format(unlearned), change)
        for split, change in run.perplexity.items()
    ]
    if not rows:
        return None
    figure, (axes,) = new_figure(0.7 + 0.42 * len(rows))
    axes.set_xscale("log")
    axes.axvline(1, color=light("ink"), linewidth=0.9)
    for place, (split, _, change) in enumerate(rows):
        colour = light("harm" if split in HARMFUL_SPLITS else "unlearned")
        axes.plot([change.low, change.high], [place, place], color=colour, linewidth=1.8, solid_capstyle="butt")
        axes.plot(change.ratio, place, "D", color=colour, markersize=5.5)
        axes.text(1.02, place, f"\u00d7{change.ratio:.3g}", va="center", transform=axes.get_yaxis_transform())
    name_rows(axes, [words for _, words, _ in rows])
    ratio_axis(axes, [value for _, _, change in rows for value in (change.low, change.ratio, change.high)])
    return Picture(
        name="perplexity",
        title="Perplexity of the dataset's answers, unlearned / base",
        caption="Diamonds are ratios, lines their 95 % intervals. On normal answers no change is wanted, on harmful "
        "ones a rise.",
        figure=figure,
        columns=("answers", "base", "unlearned", "ratio", "95 %"),
        rows=tuple(
            (
                words,
                f"{change.before:.4g}",
                f"{change.after:.4g}",
                f"\u00d7{change.ratio:.4g}",
                f"\u00d7{change.low:.4g} to \u00d7{change.high:.4g}",
            )
            for _, words, change in rows
        ),
    )


def ratio_axis(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis of ratios that holds 1 and all values, with round numbers on it."""
    low, high = min(0.9, *values), max(1.2, *values)
    margin = (high / low) ** 0.06
    axes.set_xlim(low / margin, high * margin)
    every = _NEAR_TICKS if high / low < 2 else _FAR_TICKS
    ticks = [tick for tick in every if low / margin <= tick <= high * margin]
    stride = max(1, round(len(ticks) / 6))
    start = ticks.index(1) % stride
    axes.xaxis.set_major_locator(FixedLocator(ticks[start::stride]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"\u00d7{value:g}")


def attack_chart(report: AttackReport) -> Picture:
    """Harmful share under each attack, for the unlearned model and for the base as a control."""
    titles = {card.name: card.title for card in report.cards}
    names = [f"{titles[result.attack]} {result.setting}".strip() for result in report.results]
    with matplotlib.rc_context(cast(Any, STYLE)):
        figure, (axes,) = new_figure(0.9 + 0.42 * len(names))
        for place, result in enumerate(report.results):
            mark_rate(axes, place - 0.14, result.control.harmful.after, "base")
            mark_rate(axes, place + 0.14, result.model.harmful.after, "unlearned")
        name_rows(axes, [drawable(name) for name in names])
        share_axis(axes)
        add_legend(axes, _MODELS)
    return Picture(
        name="attacks",
        title="Harmful replies under attack",
        caption="Share of questions with a harmful reply, with 95 % intervals. Of several ways to ask the worst one "
        "counts. The base model goes through the same attacks.",
        figure=figure,
        columns=("attack", "setting", "unlearned", "95 %", "base", "gibberish"),
        rows=tuple(
            (row.attack, row.setting, row.unlearned, row.interval, row.base, row.gibberish)
            for row in attack_rows(report)
        ),
    )


def sections_of(table: Sequence[TableRow]) -> Iterator[tuple[str, list[TableRow]]]:
    """The rows of a before/after table by section, in order."""
    sections: dict[str, list[TableRow]] = {}
    for row in table:
        sections.setdefault(row.section, []).append(row)
    yield from sections.items()


def prefill_rows(run: RecordedRun) -> list[tuple[str, ...]]:
    """Every length of a prefill: prompts asked, harmful shares and their change, gibberish."""
    return [
        (
            f"{run.unlearned.setup.split_name(split)}, {tokens}",
            str(change.after.total),
            percent(change.before.value),
            percent(change.after.value),
            interval(change.after),
            f"{100 * change.difference:+.1f} ({100 * change.low:+.1f} to {100 * change.high:+.1f})",
            percent(changes["degenerate"].after.value),
        )
        for split in HARMFUL_SPLITS
        for tokens, changes in run.prefill_by_length.get(split, {}).items()
        for change in (changes["harmful"],)
    ]
