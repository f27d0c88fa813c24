"""The before/after picture: what harmful prompts are answered with, and what it cost elsewhere."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator

from sku.errors import OutputError
from sku.evaluate.comparison import Comparison, PerplexityChange, RateChange
from sku.evaluate.metrics import Rate
from sku.evaluate.records import HARMFUL_SPLITS
from sku.evaluate.results import answers_words
from sku.evaluate.verdict import CANT_MEASURE

OUTCOME_COLOURS = {
    "harmful": "#D55E00",
    "evasive": "#E0C070",
    "safe_answer": "#56B4E9",
    "refusal": "#0072B2",
    "degenerate": "#8C8C8C",
    "unjudged": "#FFFFFF",
}
"""Outcome -> colour, in the order of the bars. After Okabe and Ito's palette for colour-blind readers; the lightness
differs too, so that the order survives a grey printer."""
OUTCOME_WORDS = {
    "harmful": "harmful", "evasive": "evasive", "safe_answer": "safe answer", "refusal": "refusal or deflection",
    "degenerate": "gibberish", "unjudged": "not judged",
}  # fmt: skip
_TEXT_ON = {outcome: "white" if outcome in ("harmful", "refusal") else "black" for outcome in OUTCOME_COLOURS}
_INK, _FAINT, _BASE, _UNLEARNED = "#222222", "#D9D9D9", "#767676", "#0072B2"
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "sku",
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
"""Of every figure of a report."""
SUFFIXES = (".png", ".svg", ".pdf")
_NARROWEST_LABEL = 0.055
"""Share of a bar below which its percentage would not fit into it."""


@dataclass(frozen=True, kw_only=True)
class _Bar:
    name: str
    shares: dict[str, Rate]
    y: float


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
    with matplotlib.rc_context(cast(Any, STYLE)):
        groups = _bar_groups(comparison)
        spacing = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.04, hspace=0.06)
        figure = Figure(figsize=(10.5, 1.9 + 0.78 * max(len(groups), 3)), layout=spacing)
        grid = figure.add_gridspec(2, 2, width_ratios=(1.55, 1), height_ratios=(1, 0.9))
        _draw_outcomes(figure.add_subplot(grid[:, 0]), groups)
        _draw_normal_prompts(figure.add_subplot(grid[0, 1]), comparison)
        _draw_perplexities(figure.add_subplot(grid[1, 1]), comparison)
        figure.supxlabel(_footer(comparison), fontsize=7.5, color=_BASE, x=0.005, ha="left")
        save_figure(figure, path)
    return path


def check_suffix(path: Path) -> None:
    """Refuses a file that is no picture, before anything is drawn.

    Raises:
        OutputError: The suffix is not in ``SUFFIXES``.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise OutputError(f"figure {path} must end in {', '.join(SUFFIXES)}")


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a whole figure or none; inside ``rc_context(STYLE)`` the same figure gives the same SVG, byte by byte.

    Raises:
        OutputError: The folder can't be written.
    """
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.unfinished")
    try:
        try:
            figure.savefig(temporary, dpi=200, metadata=metadata, format=path.suffix[1:].lower())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"figure {path} can't be written: {error.strerror or error}") from None


def _bar_groups(comparison: Comparison) -> list[tuple[str, list[_Bar]]]:
    """Title and two bars for each split of harmful prompts that was measured, top to bottom."""
    base, unlearned = comparison.base, comparison.unlearned
    groups: list[tuple[str, list[_Bar]]] = []
    worst = {split: tokens for split, tokens in unlearned.worst_prefill.items() if split in base.prefill}
    for kind, before, after in (
        ("reply", base.replies, unlearned.replies),
        ("prefill", {split: base.prefill[split][str(worst[split])] for split in worst}, unlearned.worst_prefills()),
    ):
        for split in ("unlearned", "unseen"):
            if before.get(split) and after.get(split):
                suffix = f", {comparison.prefill_label(split)}" if kind == "prefill" else ""
                y = 2.9 * len(groups)
                total = before[split]["harmful"].total
                judge, sides = unlearned.judge, (before[split]["harmful"], after[split]["harmful"])
                measured = all(judge.can_measure(side.value, side.low) for side in sides)
                doubt = "" if measured else f": harm, {CANT_MEASURE}"
                title = f"{unlearned.setup.split_name(split).capitalize()}{suffix} (n = {total}){doubt}"
                bars = [("base", dict(before[split]), y), ("unlearned", dict(after[split]), y + 1)]
                groups.append((title, [_Bar(name=name, shares=shares, y=place) for name, shares, place in bars]))
    return groups


def _draw_outcomes(axes: Axes, groups: Sequence[tuple[str, list[_Bar]]]) -> None:
    bars = [bar for _, pair in groups for bar in pair]
    shown = [outcome for outcome in OUTCOME_COLOURS if any(bar.shares[outcome].count for bar in bars)]
    for bar in bars:
        left = 0.0
        for outcome in shown:
            width = bar.shares[outcome].value
            axes.barh(
                bar.y, width, left=left, height=0.86, color=OUTCOME_COLOURS[outcome],
                edgecolor="white" if outcome != "unjudged" else _INK, linewidth=0.8,
                hatch="////" if outcome == "unjudged" else None,
            )  # fmt: skip
            if width >= _NARROWEST_LABEL:
                axes.text(
                    left + width / 2, bar.y, f"{100 * width:.0f} %", ha="center", va="center",
                    fontsize=8.5, color=_TEXT_ON[outcome],
                )  # fmt: skip
            left += width
    for title, pair in groups:
        axes.text(0, pair[0].y - 0.66, title, ha="left", va="bottom", fontsize=9, fontweight="bold")
    axes.set_yticks([bar.y for bar in bars], [bar.name for bar in bars])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim((bars[-1].y + 0.6) if bars else 1, -1.35)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(axis="x", length=0, labelcolor=_BASE)
    _title(axes, "Replies to harmful prompts")
    handles = [
        Patch(
            facecolor=OUTCOME_COLOURS[outcome], edgecolor=_INK if outcome == "unjudged" else "white",
            hatch="////" if outcome == "unjudged" else None, label=OUTCOME_WORDS[outcome],
        )
        for outcome in shown
    ]  # fmt: skip
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=len(handles), frameon=False,
        handlelength=1, handleheight=1, columnspacing=1.4, fontsize=8.5,
    )  # fmt: skip


def _draw_normal_prompts(axes: Axes, comparison: Comparison) -> None:
    changes = comparison.replies.get("retain_test", {})
    wanted = {"exact_answer": "exact answer", "over_refusal": "refused", "degenerate": "gibberish"}
    rows = [(words, changes[name]) for name, words in wanted.items() if name in changes]
    for row, (_, change) in enumerate(rows):
        _draw_rate(axes, row, change)
    axes.set_yticks(range(len(rows)), [words for words, _ in rows])
    axes.set_ylim(max(len(rows), 1) - 0.4, -0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    total = max((change.before.total for _, change in rows), default=0)
    _title(axes, f"Normal prompts (n = {total})")
    _frame(axes)
    axes.plot([], [], "o", color="white", markeredgecolor=_BASE, markeredgewidth=1.4, label="base")
    axes.plot([], [], "o", color=_UNLEARNED, label="unlearned")
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False, fontsize=8.5, handletextpad=0.1,
        columnspacing=1.4,
    )  # fmt: skip


def _draw_rate(axes: Axes, row: int, change: RateChange) -> None:
    for offset, rate, colour, face in (
        (-0.16, change.before, _BASE, "white"),
        (0.16, change.after, _UNLEARNED, _UNLEARNED),
    ):
        axes.plot([rate.low, rate.high], [row + offset] * 2, color=colour, linewidth=1.6, solid_capstyle="butt")
        axes.plot(rate.value, row + offset, "o", color=face, markeredgecolor=colour, markeredgewidth=1.4, markersize=6)
    label = f"{100 * change.before.value:.0f} \u2192 {100 * change.after.value:.0f} %"
    axes.text(1.05, row, label, va="center", fontsize=8.5)


def _draw_perplexities(axes: Axes, comparison: Comparison) -> None:
    harmful = {
        "unlearned": f"harmful answers,\n{comparison.unlearned.setup.answers_name()}",
        "unseen": "harmful answers,\nunseen",
    }
    rows = list(comparison.perplexity.items())
    low, high = _ratio_limits([change for _, change in rows])
    axes.set_xscale("log")
    axes.axvline(1, color=_INK, linewidth=0.9)
    for row, (split, change) in enumerate(rows):
        colour = OUTCOME_COLOURS["harmful"] if split in HARMFUL_SPLITS else _INK
        axes.plot([change.low, change.high], [row, row], color=colour, linewidth=1.6, solid_capstyle="butt")
        axes.plot(min(change.ratio, high), row, "D", color=colour, markersize=5.5)
        axes.text(
            1.029, row, f"\u00d7{change.ratio:.3g}", va="center", fontsize=8.5, transform=axes.get_yaxis_transform()
        )
    axes.set_yticks(range(len(rows)), [harmful.get(split) or answers_words(split) for split, _ in rows])
    axes.set_ylim(max(len(rows), 1) - 0.4, -0.6)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(_ratio_ticks(low, high)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"\u00d7{value:g}")
    _title(axes, "Perplexity, unlearned / base")
    _frame(axes)


def _ratio_limits(changes: Sequence[PerplexityChange]) -> tuple[float, float]:
    """A log axis that holds 1 and every finite interval."""
    finite = [value for change in changes for value in (change.low, change.high) if 0 < value < float("inf")]
    low, high = min([0.8, *finite]), max([1.25, *finite])
    margin = (high / low) ** 0.05
    return low / margin, high * margin


def _ratio_ticks(low: float, high: float) -> list[float]:
    """Round numbers on a log axis: about four of them, 1 always there."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    if high / low < 3:
        steps: Sequence[float] = (1, 1.25, 1.5, 2, 3, 5, 8)
    elif high / low < 100:
        steps = (1, 2, 5)
    else:
        stride = max(1, round(math.log10(high / low) / 4))
        return [10.0**decade for decade in decades if decade % stride == 0]
    return [step * 10.0**decade for decade in decades for step in steps]


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10.5, fontweight="bold", pad=7)


def _frame(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)


def _footer(comparison: Comparison) -> str:
    judge = comparison.unlearned.judge
    bound = ", an upper bound of the harmful share" if judge.name == "refusal_rules" else ""
    names = f"{comparison.base.setup.model['name']} / {comparison.unlearned.setup.model['name']}"
    return f"{names}. Judge: {judge.name}{bound}. Ranges: 95 % intervals."
