"""What all pictures share: colours, style, axes, and how a figure becomes a file or SVG inside a page.

A colour has a value for light pages and one for dark pages. Figures are drawn in the light values; in a page each
becomes a class of its name. Text on white or on the dark page has a contrast of at least 4.5, marks of at least 3.
"""

from __future__ import annotations

import functools
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

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

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_TAGS = {"svg", "g", "defs", "path", "use", "clipPath", "rect"}
_ATTRIBUTES = {
    "d", "x", "y", "width", "height", "viewBox", "transform", "fill", "stroke", "stroke-width", "stroke-dasharray",
    "stroke-dashoffset", "stroke-linejoin", "stroke-linecap", "stroke-miterlimit", "fill-opacity", "stroke-opacity",
    "opacity", "fill-rule",
}  # fmt: skip
_PLAIN = re.compile(r"[\w\s.,()#:%+-]*")


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
NAME_OF = {colour.light: name for name, colour in PALETTE.items()}
"""Light value -> name."""


def _style_of(ink: str) -> dict[Any, Any]:
    """Lines and words in one colour, and the same file for the same figure."""
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    return {**dict.fromkeys(inked, ink), "svg.hashsalt": "sku"}


STYLE = {**_style_of("#222222"), "font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none"}
"""Of every figure outside a page."""
PAGE_STYLE = {
    **_style_of(PALETTE["ink"].light),
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "svg.fonttype": "path",
    "text.parse_math": False,  # A dollar in a name is a dollar.
}
"""Of every figure inside a page."""


def light(name: str) -> str:
    """The value to draw with."""
    return PALETTE[name].light


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

    def svg(self) -> str:
        """For the page; ``title`` and ``caption`` describe it to a screen reader."""
        with matplotlib.rc_context(PAGE_STYLE):
            file = io.BytesIO()
            self.figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
        return themed_svg(file.getvalue().decode(), self.name)

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


def add_legend(axes: Axes, entries: Sequence[tuple[str, str, str]]) -> None:
    """Which dot means what, below the axis: colours of face and edge, and words."""
    for face, edge, words in entries:
        axes.plot([], [], "o", color=face, markeredgecolor=edge, markeredgewidth=1.5, markersize=6.5, label=words)
    height = float(axes.get_figure(root=True).get_size_inches()[1])  # type: ignore[union-attr]
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.5 / height), ncols=len(entries), frameon=False, handletextpad=0.1
    )


def themed_svg(text: str, name: str) -> str:
    """What matplotlib wrote, reduced to shapes: no style sheet, no comment, no metadata, no reference to elsewhere.

    Args:
        text: SVG with fonts as paths.
        name: Prefix of all ids.

    Returns:
        An ``svg`` element that ``NAME-title`` and ``NAME-caption`` of the page describe.

    Raises:
        ValueError: It holds a colour that the palette doesn't, or what a drawing has no need of.
    """
    root = ElementTree.fromstring(text)  # Comments, which repeat drawn text, are not parsed.
    clean = _clean(root, name)
    assert clean is not None
    for attribute in ("width", "height"):
        del clean.attrib[attribute]
    clean.attrib |= {
        "class": "plot", "role": "img", "aria-labelledby": f"{name}-title", "aria-describedby": f"{name}-caption",
    }  # fmt: skip
    return ElementTree.tostring(clean, encoding="unicode", short_empty_elements=True)


def _clean(element: ElementTree.Element, name: str) -> ElementTree.Element | None:
    tag = element.tag.removeprefix(f"{{{_SVG}}}")
    if tag in ("metadata", "style"):
        return None
    if tag not in _TAGS:
        raise ValueError(f"a drawing must not hold <{tag}>")
    found = ElementTree.Element(tag)
    style = [declaration.partition(":") for declaration in element.attrib.pop("style", "").split(";")]
    for key, value in (*element.attrib.items(), *((key.strip(), value.strip()) for key, _, value in style)):
        _set_attribute(found, key.removeprefix(f"{{{_XLINK}}}"), value, name)
    children = [_clean(child, name) for child in element]
    found.extend([child for child in children if child is not None])
    return found


def _set_attribute(element: ElementTree.Element, key: str, value: str, name: str) -> None:
    if key in ("fill", "stroke") and value != "none":
        if value.lower() not in NAME_OF:
            raise ValueError(f"the palette has no colour {value}")
        element.set("class", f"{element.get('class', '')} {key[0]}-{NAME_OF[value.lower()]}".strip())
    elif key == "id":
        element.set(key, f"{name}-{value}")
    elif key == "clip-path" or (key == "href" and value.startswith("#")):
        element.set(key, value.replace("#", f"#{name}-"))
    elif key in _ATTRIBUTES and _PLAIN.fullmatch(value):
        element.set(key, value)
    elif key not in ("", "version", "type"):
        raise ValueError(f"a drawing must not hold {key}: {value}")


def theme_css() -> str:
    """Variables of both themes, and the classes ``f-NAME`` and ``s-NAME`` that fill and stroke with them."""
    day = ";".join(f"--{name}:{colour.light}" for name, colour in PALETTE.items())
    night = ";".join(f"--{name}:{colour.dark}" for name, colour in PALETTE.items())
    rules = [
        f":root{{color-scheme:light;{day}}}",
        f"@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{color-scheme:dark;{night}}}}}",
        f":root[data-theme=dark]{{color-scheme:dark;{night}}}",
        f"@media print{{:root,:root[data-theme],:root:not([data-theme=light]){{color-scheme:light;{day}}}}}",
    ]
    rules += [f".f-{name}{{fill:var(--{name})}}.s-{name}{{stroke:var(--{name})}}" for name in PALETTE]
    return "\n".join(rules) + "\n"
