"""Pictures of base and unlearned model: outcomes of replies, normal prompts, perplexities; all in one for a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from sku.evaluate.comparison import Comparison
from sku.evaluate.metrics import HARM_WORDS, Rate, RateChange, start_words
from sku.evaluate.records import HARMFUL, HARMFUL_SPLITS, answers_words, in_order
from sku.evaluate.results import Rates
from sku.evaluate.verdict import CANT_MEASURE
from sku.report.figures import (
    PAGE_STYLE,
    STYLE,
    Picture,
    bare,
    check_suffix,
    light,
    name_rows,
    new_figure,
    ratio_ticks,
    save_figure,
    share_axis,
)
from sku.report.run_charts import draw_rates
from sku.report.words import in_points, interval, percent

OUTCOMES = {
    "harmful": "harmful", "evasive": "evasive", "safe_answer": "safe answer", "refusal": "refusal",
    "gibberish": "gibberish", "unjudged": "not judged",
}  # fmt: skip
"""Outcome -> its word, in the order of the bars."""
_TEXT_ON = {outcome: "on_deep" if outcome == "refusal" else "on_bright" for outcome in OUTCOMES}
_NARROWEST_LABEL = 0.1
_NORMAL = {"exact_answer": "exact answer", "over_refusal": "refused", "gibberish": "gibberish"}
_HARMFUL_ANSWERS = {"forget_train": "harmful, {}", "forget_test": "harmful, unseen"}
_NEAR_TICKS, _FAR_TICKS = (
    (0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5),
    (0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 1e3, 1e4, 1e6, 1e9),
)


def result_charts(comparison: Comparison) -> list[Picture]:
    """Outcomes, normal prompts and perplexities, those that were measured."""
    with matplotlib.rc_context(PAGE_STYLE):
        drawn = (outcome_chart(comparison), normal_chart(comparison), perplexity_chart(comparison))
    return [picture for picture in drawn if picture is not None]


def outcome_chart(comparison: Comparison) -> Picture | None:
    """Stacked shares of the outcomes of replies to harmful prompts, base above unlearned, a group for each way."""
    groups = outcome_groups(comparison)
    if not groups:
        return None
    figure, (axes,) = new_figure(0.9 + 0.92 * len(groups))
    shown = draw_outcomes(axes, groups)
    outcome_legend(axes, shown, (0.42, -0.07 - 0.1 / len(groups)), 3)
    return Picture(
        name="outcomes",
        title="Replies to harmful prompts",
        caption="Share of replies by outcome, for the base model and below it the unlearned one; after a prefill "
        "the reply was made to begin with a harmful reply's first words; of the lengths tried the worst is shown.",
        figure=figure,
        columns=("asked", "model", *(OUTCOMES[name] for name in shown)),
        rows=tuple(
            (group.title, name, *(percent(side[outcome].value) for outcome in shown))
            for group in groups
            for name, side in group.sides
        ),
    )


@dataclass(frozen=True, kw_only=True)
class OutcomeGroup:
    """Replies to one split of harmful prompts, asked in one way."""

    title: str
    label: str
    """The title with the number of prompts, and where the judge can't tell harm."""
    before: Rates
    after: Rates

    @property
    def sides(self) -> tuple[tuple[str, Rates], tuple[str, Rates]]:
        """Names and rates of both models."""
        return ("base", self.before), ("unlearned", self.after)


def outcome_groups(comparison: Comparison) -> list[OutcomeGroup]:
    """All that was asked of both models, free replies first, then those after the worst prefill."""
    base, unlearned = comparison.base, comparison.unlearned
    named, judge = unlearned.setup.split_name, unlearned.judge
    found = [
        (named(split), base.replies[split], unlearned.replies[split])
        for split in in_order(base.replies)
        if split in HARMFUL_SPLITS or split.startswith(HARMFUL)
        if base.replies.get(split) and unlearned.replies.get(split)
    ] + [
        (
            f"{named(split)}, {comparison.prefill_label(split)}",
            base.prefill[split][unlearned.worst_prefill[split]],
            worst,
        )
        for split, worst in unlearned.worst_prefills().items()
        if split in base.prefill
    ]
    groups = []
    for title, before, after in found:
        measured = all(judge.can_measure(side["harmful"].value, side["harmful"].low) for side in (before, after))
        doubt = "" if measured else f": harm, {CANT_MEASURE}"
        label = f"{title} (n = {after['harmful'].total}){doubt}"
        groups.append(OutcomeGroup(title=title, label=label, before=before, after=after))
    return groups


LABEL_ROOM = 46
"""Points that the names of the two models take to the left of the bars."""


def draw_outcomes(axes: Axes, groups: Sequence[OutcomeGroup]) -> list[str]:
    """Draws the groups, the first on top, and tells which outcomes there are."""
    shown = [name for name in OUTCOMES if any(side[name].count for group in groups for _, side in group.sides)]
    places: list[float] = []
    for number, group in enumerate(groups):
        top = 2.9 * number
        # Long ones need the room beside the bars, too; the bars don't make way for them.
        name = axes.annotate(
            group.label, (0, top - 0.6), (-LABEL_ROOM, 0), textcoords="offset points", va="bottom", fontweight="bold"
        )
        name.set_in_layout(False)
        for offset, (_, side) in enumerate(group.sides):
            places.append(top + offset)
            _stack(axes, top + offset, side, shown)
    axes.set_yticks(places, ["base", "unlearned"] * len(groups))
    axes.set_ylim((places[-1] if places else 1) + 0.6, -1.4)
    axes.tick_params(length=0)
    share_axis(axes)
    axes.set_xlim(0, 1)
    axes.spines[["left", "bottom"]].set_visible(False)
    return shown


def outcome_legend(axes: Axes, shown: Sequence[str], anchor: tuple[float, float], columns: int) -> None:
    """Which colour is which outcome, below the axis."""
    axes.legend(
        handles=[matplotlib.patches.Patch(facecolor=light(name), label=OUTCOMES[name]) for name in shown],
        loc="upper center", bbox_to_anchor=anchor, ncols=min(columns, max(len(shown), 1)),
        frameon=False, handlelength=1, handleheight=1, columnspacing=1.2,
    )  # fmt: skip


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


def normal_changes(comparison: Comparison) -> list[tuple[str, RateChange]]:
    """Words and change of each rate of replies to normal prompts that was measured."""
    changes = comparison.normal.get("retain_test", {})
    return [(words, changes[name]) for name, words in _NORMAL.items() if name in changes]


def draw_normal(axes: Axes, rows: Sequence[tuple[str, RateChange]]) -> None:
    """Draws rates of both models."""
    draw_rates(axes, [(words, (change.before, change.after)) for words, change in rows])


def normal_chart(comparison: Comparison) -> Picture | None:
    """Shares of replies to normal prompts with their intervals."""
    rows = normal_changes(comparison)
    if not rows:
        return None
    figure, (axes,) = new_figure(0.9 + 0.5 * len(rows))
    draw_normal(axes, rows)
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
                in_points(change.difference, change.low, change.high),
            )
            for words, change in rows
        ),
    )


def draw_perplexities(axes: Axes, comparison: Comparison) -> list[str]:
    """Draws the ratios of perplexities with their intervals, and tells whose answers each row is of."""
    unlearned = comparison.unlearned.setup.answers_name()
    names = [
        (_HARMFUL_ANSWERS.get(split) or answers_words(split)).format(unlearned) for split in comparison.perplexity
    ]
    axes.set_xscale("log")
    axes.axvline(1, color=light("ink"), linewidth=0.9)
    for place, (split, change) in enumerate(comparison.perplexity.items()):
        colour = light("harm" if split in HARMFUL_SPLITS else "unlearned")
        axes.plot([change.low, change.high], [place, place], color=colour, linewidth=1.8, solid_capstyle="butt")
        axes.plot(change.ratio, place, "D", color=colour, markersize=5.5)
        axes.text(1.02, place, f"\u00d7{change.ratio:.3g}", va="center", transform=axes.get_yaxis_transform())
    name_rows(axes, names)
    changes = comparison.perplexity.values()
    ratio_axis(axes, [value for change in changes for value in (change.low, change.ratio, change.high)])
    return names


def perplexity_chart(comparison: Comparison) -> Picture | None:
    """Perplexity of fixed answers after unlearning, in units of what it was before."""
    changes = comparison.perplexity.values()
    if not changes:
        return None
    figure, (axes,) = new_figure(0.7 + 0.42 * len(changes))
    names = draw_perplexities(axes, comparison)
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
            for words, change in zip(names, changes, strict=True)
        ),
    )


def ratio_axis(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis of ratios that holds 1 and all values, with round numbers on it."""
    low, high = min([0.9, *values]), max([1.2, *values])
    margin = (high / low) ** 0.06
    axes.set_xlim(low / margin, high * margin)
    every = _NEAR_TICKS if high / low < 2 else _FAR_TICKS
    ticks = [tick for tick in every if low / margin <= tick <= high * margin]
    stride = max(1, round(len(ticks) / 6))
    start = ticks.index(1) % stride
    ratio_ticks(axes, ticks[start::stride])


def prefill_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Every prefill: prompts asked, harmful shares and their change, gibberish."""
    return [
        (
            f"{comparison.unlearned.setup.split_name(split)}, {start_words(key)}",
            str(change.after.total),
            *(cell for rate in HARM_WORDS for cell in _shares(changes[rate])),
            percent(changes["gibberish"].after.value),
        )
        for split in HARMFUL_SPLITS
        for key, changes in comparison.prefill_by_key.get(split, {}).items()
        if (change := changes.get("harmful")) is not None
    ]


PREFILL_COLUMNS = (
    "prompts, tokens given", "prompts",
    *(f"{words}: {of}" for words in HARM_WORDS.values() for of in ("base", "unlearned", "change (95 %), points")),
    "gibberish, unlearned",
)  # fmt: skip
"""Of ``prefill_rows``."""


def _shares(change: RateChange) -> tuple[str, str, str]:
    points = in_points(change.difference, change.low, change.high)
    return percent(change.before.value), percent(change.after.value), points


def before_after_figure(comparison: Comparison, path: Path) -> Path:
    """Draws base against unlearned model.

    Left, the outcome shares of replies to harmful prompts, freely answered and after the worst prefill. Right, normal
    prompts (shares with Wilson 95 % intervals) and the perplexity ratio of fixed answers (bootstrap 95 % intervals).

    Args:
        comparison: From ``sku.evaluate.comparison.compare``.
        path: ``.png``, ``.svg`` or ``.pdf``; what is there is replaced.

    Returns:
        ``path``.

    Raises:
        OutputError: Another suffix, or a folder that can't be written.
    """
    check_suffix(path)
    groups, normal = outcome_groups(comparison), normal_changes(comparison)
    with matplotlib.rc_context(STYLE):
        spacing = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.04, hspace=0.06)
        figure = Figure(figsize=(10.5, 1.9 + 0.78 * max(len(groups), 3)), layout=spacing)
        grid = figure.add_gridspec(2, 2, width_ratios=(1.55, 1), height_ratios=(1, 0.9))
        outcomes = bare(figure.add_subplot(grid[:, 0]), "Replies to harmful prompts")
        outcome_legend(outcomes, draw_outcomes(outcomes, groups), (0.5, -0.06), 6)
        total = max((change.before.total for _, change in normal), default=0)
        shares = bare(figure.add_subplot(grid[0, 1]), f"Normal prompts (n = {total})")
        draw_normal(shares, normal)
        for row, (_, change) in enumerate(normal):
            shares.text(
                1.05, row, f"{100 * change.before.value:.0f} \u2192 {100 * change.after.value:.0f} %", va="center"
            )
        ratios = bare(figure.add_subplot(grid[1, 1]), "Perplexity, unlearned / base")
        draw_perplexities(ratios, comparison)
        figure.supxlabel(_footer(comparison), fontsize=7.5, color=light("base"), x=0.005, ha="left")
        save_figure(figure, path)
    return path


def _footer(comparison: Comparison) -> str:
    judge = comparison.unlearned.judge
    bound = ", an upper bound of the harmful share" if judge.name == "refusal_rules" else ""
    names = f"{comparison.base.setup.model['name']} / {comparison.unlearned.setup.model['name']}"
    return f"{names}. Judge: {judge.name}{bound}. Ranges: 95 % intervals."
