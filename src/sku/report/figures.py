"""What all pictures share, and those of base against unlearned model: outcomes, normal prompts, perplexities.

All are drawn on white, on dark pages too. Text has a contrast of at least 4.5 to it, marks of at least 3.
"""

from __future__ import annotations

import base64
import functools
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, NullLocator

from sku.errors import OutputError
from sku.evaluate.comparison import Comparison
from sku.evaluate.metrics import Rate, RateChange
from sku.evaluate.records import HARMFUL, HARMFUL_SPLITS, answers_words, in_order
from sku.evaluate.results import Rates
from sku.evaluate.verdict import CANT_MEASURE
from sku.report.words import before_after, interval, percent
from sku.storage import named_disk_errors

SUFFIXES = (".png", ".svg", ".pdf")
PALETTE = {
    "paper": "#ffffff", "ink": "#1f2328", "muted": "#57606a", "faint": "#d9dee3", "band": "#f4f4f4",
    "base": "#6b7077", "unlearned": "#0063a6", "harm": "#b34700",
    "second": "#8a4f7d", "third": "#00785a", "fourth": "#8a6a00",
    # Harm after a prefill, the longest last.
    "prefill_1": "#f2b58a", "prefill_2": "#d98243", "prefill_3": "#a9561b", "prefill_4": "#73360b",
    "prefill_5": "#4a2206",
    # Bars of outcomes carry their own text: Okabe and Ito's colours.
    "harmful": "#d55e00", "evasive": "#e0c070", "safe_answer": "#56b4e9", "refusal": "#0072b2",
    "gibberish": "#8c8c8c", "unjudged": "#dcdcdc", "on_bright": "#000000", "on_deep": "#fefefe",
}  # fmt: skip
"""Name -> colour."""
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
PAGE_STYLE: dict[Any, Any] = {
    **dict.fromkeys(_INKED, PALETTE["ink"]),
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "svg.fonttype": "path",
    "svg.hashsalt": "sku",  # The same file for the same figure.
    "text.parse_math": False,  # A dollar in a name is a dollar.
}
"""Of every figure inside a page."""
STYLE = {**PAGE_STYLE, "font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none"}
"""Of every figure outside a page."""


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a whole figure or none; inside ``rc_context(STYLE)`` the same figure gives the same SVG, byte by byte.

    Raises:
        OutputError: Another suffix than ``SUFFIXES``, or the folder can't be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise OutputError(f"figure {path} must end in {', '.join(SUFFIXES)}")
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.unfinished")
    with named_disk_errors(path):
        try:
            figure.savefig(temporary, dpi=200, metadata=metadata, format=path.suffix[1:].lower())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure with its numbers for a reader who can't see it."""

    name: str
    """Stem of its files and prefix of its ids."""
    figure: Figure
    columns: tuple[str, ...]
    """Of the table of its numbers."""
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        with matplotlib.rc_context(PAGE_STYLE):
            self.figure.draw_without_rendering()
        # Each drawing would lay the figure out anew, a little differently.
        self.figure.set_layout_engine("none")

    def address(self) -> str:
        """As a ``data:`` address; nothing in an SVG that is an image can run or load anything."""
        with matplotlib.rc_context(PAGE_STYLE):
            file = io.BytesIO()
            self.figure.savefig(file, format="svg", metadata={"Date": None})
        return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"

    def save(self, folder: Path) -> list[Path]:
        """Writes ``NAME.png`` and ``NAME.svg``, on white.

        Raises:
            OutputError: The folder can't be written.
        """
        with matplotlib.rc_context(PAGE_STYLE):
            return [save_figure(self.figure, folder / f"{self.name}.{suffix}") for suffix in ("png", "svg")]


def new_figure(height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with panels below each other, in inches so wide that two fill a page and one still reads on a phone."""
    spacing = ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.05, hspace=0.08)
    figure = Figure(figsize=(5.4, height), layout=spacing, facecolor=PALETTE["paper"])
    return figure, [bare(panel) for panel in figure.subplots(panels, 1, squeeze=False)[:, 0]]


def bare(axes: Axes, title: str = "") -> Axes:
    """Without a frame above and at the right; with a heading where there is one to give."""
    axes.set_facecolor(PALETTE["paper"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if title:
        axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", pad=7)
    return axes


@functools.cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(PAGE_STYLE["font.family"])).get_charmap())


def drawable(text: str, longest: int = 34) -> str:
    """A name as a figure can show it: on one line, cut, and without characters that the font lacks."""
    shown = "".join(letter if ord(letter) in _glyphs() else "\ufffd" for letter in " ".join(text.split()))
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}\u2026"


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """One named row for each entry, the first on top."""
    axes.set_yticks(range(len(names)), [drawable(name) for name in names])
    axes.set_ylim(max(len(names), 1) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=PALETTE["faint"], linewidth=0.7)


def share_axis(axes: Axes, along: Literal["x", "y"] = "x") -> None:
    """0 to 100 %, with room for a mark at both ends."""
    axes.set(**{
        f"{along}lim": (-0.02, 1.02),
        f"{along}ticks": [0, 0.25, 0.5, 0.75, 1],
        f"{along}ticklabels": ["0", "25", "50", "75", "100 %"],
    })  # fmt: skip


def ratio_ticks(axes: Axes, ratios: Sequence[float]) -> None:
    """Marks ratios on the horizontal axis, as ``x1.05``."""
    axes.xaxis.set_major_locator(FixedLocator(ratios))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"\u00d7{value:g}")


def draw_rates(axes: Axes, rows: Sequence[tuple[str, tuple[Rate, Rate]]]) -> None:
    """Draws dots of base and unlearned model with their intervals in named rows; those of the base are hollow."""
    for name, face, offset in (("base", "paper", -0.15), ("unlearned", "unlearned", 0.15)):
        dot: Any = {
            "color": PALETTE[face], "markeredgecolor": PALETTE[name], "markeredgewidth": 1.5, "markersize": 6.5,
        }  # fmt: skip
        for place, (_, rates) in enumerate(rows):
            rate, y = rates[name == "unlearned"], place + offset
            axes.plot([rate.low, rate.high], [y, y], color=PALETTE[name], linewidth=1.8, solid_capstyle="butt")
            axes.plot(rate.value, y, "o", **dot)
        axes.plot([], [], "o", label=name, **dot)
    name_rows(axes, [name for name, _ in rows])
    share_axis(axes)
    height = float(axes.get_figure(root=True).get_size_inches()[1])  # type: ignore[union-attr]
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.5 / height), ncols=2, frameon=False, handletextpad=0.1)


OUTCOMES = {
    "harmful": "harmful", "evasive": "evasive", "safe_answer": "safe answer", "refusal": "refusal",
    "gibberish": "gibberish", "unjudged": "not judged",
}  # fmt: skip
"""Outcome -> its word, in the order of the bars."""
_NORMAL = {"exact_answer": "exact answer", "over_refusal": "refused", "gibberish": "gibberish"}
_HARMFUL_ANSWERS = {"forget_train": "harmful, {}", "forget_test": "harmful, unseen"}
_NEAR_TICKS, _FAR_TICKS = (
    (0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5),
    (0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 1e3, 1e4, 1e6, 1e9),
)


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Replies to one split of harmful prompts, asked in one way."""

    title: str
    label: str
    """The title with the number of prompts, and where the judge can't tell harm."""
    sides: tuple[tuple[str, Rates], tuple[str, Rates]]
    """Names and rates of both models, the base first."""


def _groups(comparison: Comparison) -> list[_Group]:
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
        groups.append(_Group(title=title, label=label, sides=(("base", before), ("unlearned", after))))
    return groups


def _draw_outcomes(axes: Axes, groups: Sequence[_Group], anchor: tuple[float, float], columns: int) -> list[str]:
    """Stacked shares of outcomes, the first group on top, with a legend below; tells which outcomes there are."""
    shown = [name for name in OUTCOMES if any(side[name].count for group in groups for _, side in group.sides)]
    places: list[float] = []
    for number, group in enumerate(groups):
        top = 2.9 * number
        # Long ones need the room beside the bars, too; the bars don't make way for them.
        name = axes.annotate(
            group.label, (0, top - 0.6), (-46, 0), textcoords="offset points", va="bottom", fontweight="bold"
        )
        name.set_in_layout(False)
        for offset, (_, side) in enumerate(group.sides):
            places.append(top + offset)
            left = 0.0
            for outcome in filter(lambda outcome: side[outcome].value, shown):
                width, deep = side[outcome].value, outcome == "refusal"
                axes.barh(
                    places[-1], width, left=left, height=0.88, color=PALETTE[outcome], edgecolor=PALETTE["paper"],
                    linewidth=0.8,
                )  # fmt: skip
                if width >= 0.1:
                    axes.text(
                        left + width / 2, places[-1], f"{100 * width:.0f} %", ha="center", va="center", fontsize=9,
                        color=PALETTE["on_deep" if deep else "on_bright"],
                    )  # fmt: skip
                left += width
    axes.set_yticks(places, ["base", "unlearned"] * len(groups))
    axes.set_ylim((places[-1] if places else 1) + 0.6, -1.4)
    axes.tick_params(length=0)
    share_axis(axes)
    axes.set_xlim(0, 1)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.legend(
        handles=[matplotlib.patches.Patch(facecolor=PALETTE[name], label=OUTCOMES[name]) for name in shown],
        loc="upper center", bbox_to_anchor=anchor, ncols=min(columns, max(len(shown), 1)),
        frameon=False, handlelength=1, handleheight=1, columnspacing=1.2,
    )  # fmt: skip
    return shown


def _normal_changes(comparison: Comparison) -> list[tuple[str, RateChange]]:
    changes = comparison.normal.get("retain_test", {})
    return [(words, changes[name]) for name, words in _NORMAL.items() if name in changes]


def _draw_perplexities(axes: Axes, comparison: Comparison) -> list[str]:
    """Draws the ratios of perplexities with their intervals, and tells whose answers each row is of."""
    unlearned = comparison.unlearned.setup.answers_name()
    names = [
        (_HARMFUL_ANSWERS.get(split) or answers_words(split)).format(unlearned) for split in comparison.perplexity
    ]
    axes.set_xscale("log")
    axes.axvline(1, color=PALETTE["ink"], linewidth=0.9)
    for place, (split, change) in enumerate(comparison.perplexity.items()):
        colour = PALETTE["harm" if split in HARMFUL_SPLITS else "unlearned"]
        axes.plot([change.low, change.high], [place, place], color=colour, linewidth=1.8, solid_capstyle="butt")
        axes.plot(change.ratio, place, "D", color=colour, markersize=5.5)
        axes.text(1.02, place, f"\u00d7{change.ratio:.3g}", va="center", transform=axes.get_yaxis_transform())
    name_rows(axes, names)
    changes = comparison.perplexity.values()
    values = [value for change in changes for value in (change.low, change.ratio, change.high)]
    low, high = min([0.9, *values]), max([1.2, *values])
    margin = (high / low) ** 0.06
    axes.set_xlim(low / margin, high * margin)
    every = _NEAR_TICKS if high / low < 2 else _FAR_TICKS
    ticks = [tick for tick in every if low / margin <= tick <= high * margin]
    stride = max(1, round(len(ticks) / 6))
    ratio_ticks(axes, ticks[ticks.index(1) % stride :: stride])
    return names


def result_charts(comparison: Comparison) -> list[Picture]:
    """Outcomes, normal prompts and perplexities, those that were measured."""
    found = []
    with matplotlib.rc_context(PAGE_STYLE):
        if groups := _groups(comparison):
            figure, (axes,) = new_figure(0.9 + 0.92 * len(groups))
            shown = _draw_outcomes(axes, groups, (0.42, -0.07 - 0.1 / len(groups)), 3)
            found.append(Picture(
                name="outcomes",
                figure=figure,
                columns=("asked", "model", *(OUTCOMES[name] for name in shown)),
                rows=tuple(
                    (group.title, name, *(percent(side[outcome].value) for outcome in shown))
                    for group in groups
                    for name, side in group.sides
                ),
            ))  # fmt: skip
        if rows := _normal_changes(comparison):
            figure, (axes,) = new_figure(0.9 + 0.5 * len(rows))
            draw_rates(axes, [(words, (change.before, change.after)) for words, change in rows])
            found.append(Picture(
                name="normal",
                figure=figure,
                columns=("share of replies", "base", "unlearned", "95 %", "change, points"),
                rows=tuple(
                    (words, before, after, interval(change.after), points)
                    for words, change in rows
                    for before, after, points in [before_after(change)]
                ),
            ))  # fmt: skip
        if changes := comparison.perplexity.values():
            figure, (axes,) = new_figure(0.7 + 0.42 * len(changes))
            names = _draw_perplexities(axes, comparison)
            found.append(Picture(
                name="perplexity",
                figure=figure,
                columns=("answers", "base", "unlearned", "ratio", "95 %"),
                rows=tuple(
                    (words, f"{change.before:.4g}", f"{change.after:.4g}", f"\u00d7{change.ratio:.4g}",
                     f"\u00d7{change.low:.4g} to \u00d7{change.high:.4g}")
                    for words, change in zip(names, changes, strict=True)
                ),
            ))  # fmt: skip
    return found


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
    groups, normal = _groups(comparison), _normal_changes(comparison)
    with matplotlib.rc_context(STYLE):
        spacing = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.04, hspace=0.06)
        figure = Figure(figsize=(10.5, 1.9 + 0.78 * max(len(groups), 3)), layout=spacing)
        grid = figure.add_gridspec(2, 2, width_ratios=(1.55, 1), height_ratios=(1, 0.9))
        _draw_outcomes(bare(figure.add_subplot(grid[:, 0]), "Replies to harmful prompts"), groups, (0.5, -0.06), 6)
        total = max((change.before.total for _, change in normal), default=0)
        shares = bare(figure.add_subplot(grid[0, 1]), f"Normal prompts (n = {total})")
        draw_rates(shares, [(words, (change.before, change.after)) for words, change in normal])
        for row, (_, change) in enumerate(normal):
            shares.text(
                1.05, row, f"{100 * change.before.value:.0f} \u2192 {100 * change.after.value:.0f} %", va="center"
            )
        _draw_perplexities(bare(figure.add_subplot(grid[1, 1]), "Perplexity, unlearned / base"), comparison)
        judge = comparison.unlearned.judge
        bound = ", an upper bound of the harmful share" if judge.name == "refusal_rules" else ""
        names = f"{comparison.base.setup.model['name']} / {comparison.unlearned.setup.model['name']}"
        words = f"{names}. Judge: {judge.name}{bound}. Ranges: 95 % intervals."
        figure.supxlabel(words, fontsize=7.5, color=PALETTE["base"], x=0.005, ha="left")
        return save_figure(figure, path)
