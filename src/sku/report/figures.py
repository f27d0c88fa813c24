"""What all pictures share: colours, style, axes, and how a figure becomes a file or an image inside a page.

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
from sku.storage import named_disk_errors

SUFFIXES = (".png", ".svg", ".pdf")
WIDTH = 5.4
"""Inches: two beside each other fill the page, one still reads on a phone."""

PALETTE = {
    "paper": "#ffffff",
    "ink": "#1f2328",
    "muted": "#57606a",
    "faint": "#d9dee3",
    "base": "#6b7077",
    "unlearned": "#0063a6",
    "harm": "#b34700",
    "second": "#8a4f7d",
    "third": "#00785a",
    "fourth": "#8a6a00",
    # Harm after a prefill, the longest last.
    "prefill_1": "#f2b58a",
    "prefill_2": "#d98243",
    "prefill_3": "#a9561b",
    "prefill_4": "#73360b",
    "prefill_5": "#4a2206",
    # Bars of outcomes carry their own text: Okabe and Ito's colours.
    "harmful": "#d55e00",
    "evasive": "#e0c070",
    "safe_answer": "#56b4e9",
    "refusal": "#0072b2",
    "gibberish": "#8c8c8c",
    "unjudged": "#dcdcdc",
    "on_bright": "#000000",
    "on_deep": "#fefefe",
}
"""Name -> colour."""


def _style_of(ink: str) -> dict[Any, Any]:
    """Lines and words in one colour, and the same file for the same figure."""
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    return {**dict.fromkeys(inked, ink), "svg.hashsalt": "sku"}


STYLE = {**_style_of("#222222"), "font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none"}
"""Of every figure outside a page."""
PAGE_STYLE = {
    **_style_of(PALETTE["ink"]),
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "svg.fonttype": "path",
    "text.parse_math": False,  # A dollar in a name is a dollar.
}
"""Of every figure inside a page."""


def light(name: str) -> str:
    """The value to draw with."""
    return PALETTE[name]


def ratio_ticks(axes: Axes, ratios: Sequence[float]) -> None:
    """Marks ratios on the horizontal axis, as ``x1.05``."""
    axes.xaxis.set_major_locator(FixedLocator(ratios))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"\u00d7{value:g}")


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
    with named_disk_errors(path):
        try:
            figure.savefig(temporary, dpi=200, metadata=metadata, format=path.suffix[1:].lower())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure with what a reader needs who can't see it."""

    name: str
    """Stem of its files and prefix of its ids."""
    title: str
    caption: str
    """What is drawn, and what its ranges are."""
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
        paths = [folder / f"{self.name}.{suffix}" for suffix in ("png", "svg")]
        with matplotlib.rc_context(PAGE_STYLE):
            for path in paths:
                save_figure(self.figure, path)
        return paths


def new_figure(height: float, panels: int = 1, *, width: float = WIDTH) -> tuple[Figure, list[Axes]]:
    """A figure with panels below each other. Draw inside ``matplotlib.rc_context(PAGE_STYLE)``."""
    spacing = ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.05, hspace=0.08)
    figure = Figure(figsize=(width, height), layout=spacing, facecolor=light("paper"))
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    return figure, [bare(panel) for panel in axes]


def bare(axes: Axes, title: str = "") -> Axes:
    """Without a frame above and at the right; with a heading where there is one to give."""
    axes.set_facecolor(light("paper"))
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
    axes.grid(axis="x", color=light("faint"), linewidth=0.7)


def share_axis(axes: Axes, along: Literal["x", "y"] = "x") -> None:
    """0 to 100 %, with room for a mark at both ends."""
    axes.set(**{
        f"{along}lim": (-0.02, 1.02),
        f"{along}ticks": [0, 0.25, 0.5, 0.75, 1],
        f"{along}ticklabels": ["0", "25", "50", "75", "100 %"],
    })  # fmt: skip
