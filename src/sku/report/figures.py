"""What all pictures share: colours, style, and how a figure becomes a file.

A colour has a value for light pages and one for dark pages. Figures are drawn in the light values; in a page each
becomes a class of its name. Text on white or on the dark page has a contrast of at least 4.5, marks of at least 3.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from sku.errors import OutputError
from sku.storage import named_disk_errors

SUFFIXES = (".png", ".svg", ".pdf")
_INK = "#222222"


def style_of(ink: str) -> dict[Any, Any]:
    """What all figures share: lines and words in one colour, and the same file for the same figure."""
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    return {**dict.fromkeys(inked, ink), "svg.hashsalt": "sku"}


STYLE = {**style_of(_INK), "font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none"}
"""Of every figure outside a page."""


@dataclass(frozen=True, kw_only=True)
class Colour:
    """One colour in both themes."""

    light: str
    dark: str


PALETTE = {
    "paper": Colour(light="#ffffff", dark="#12161b"),
    "ink": Colour(light="#1f2328", dark="#e6edf3"),
    "muted": Colour(light="#57606a", dark="#a3adb8"),
    "faint": Colour(light="#d9dee3", dark="#39414a"),
    "panel": Colour(light="#f4f6f8", dark="#1b2128"),
    "accent": Colour(light="#0b5cad", dark="#79bbff"),
    "base": Colour(light="#6b7077", dark="#a9b0b8"),
    "unlearned": Colour(light="#0063a6", dark="#6cb8f0"),
    "harm": Colour(light="#b34700", dark="#ff9a4d"),
    "second": Colour(light="#8a4f7d", dark="#dba6cb"),
    "third": Colour(light="#00785a", dark="#4fc9a4"),
    "fourth": Colour(light="#8a6a00", dark="#e3c15c"),
    # Harm after a prefill, the longest last.
    "prefill_1": Colour(light="#f2b58a", dark="#7a4a22"),
    "prefill_2": Colour(light="#d98243", dark="#a9561b"),
    "prefill_3": Colour(light="#a9561b", dark="#d98243"),
    "prefill_4": Colour(light="#73360b", dark="#f2b58a"),
    "prefill_5": Colour(light="#4a2206", dark="#ffdcc4"),
    # Bars of outcomes carry their own text, so they stay as they are: Okabe and Ito's colours.
    "harmful": Colour(light="#d55e00", dark="#d55e00"),
    "evasive": Colour(light="#e0c070", dark="#e0c070"),
    "safe_answer": Colour(light="#56b4e9", dark="#56b4e9"),
    "refusal": Colour(light="#0072b2", dark="#0072b2"),
    "gibberish": Colour(light="#8c8c8c", dark="#8c8c8c"),
    "unjudged": Colour(light="#dcdcdc", dark="#dcdcdc"),
    "on_bright": Colour(light="#000000", dark="#000000"),
    "on_deep": Colour(light="#fefefe", dark="#fefefe"),
}
"""Name -> colour; no two names have the same light value."""


def light(name: str) -> str:
    """The value to draw with."""
    return PALETTE[name].light


NAME_OF = {colour.light: name for name, colour in PALETTE.items()}
"""Light value -> name."""


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
