"""Figures as files, and as SVG inside a page: clean, with colours by class, so that they follow the page's theme."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine

from sku.report.figures import NAME_OF, PALETTE, light, save_figure, style_of

STYLE = {
    **style_of(light("ink")),
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "svg.fonttype": "path",
    "text.parse_math": False,  # A dollar in a name is a dollar.
}
WIDTH = 5.4
"""Inches: two beside each other fill the page, one still reads on a phone."""

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_TAGS = {"svg", "g", "defs", "path", "use", "clipPath", "rect"}
_ATTRIBUTES = {"d", "x", "y", "width", "height", "viewBox", "transform", "clip-path", "id"}
_PROPERTIES = {
    "stroke-width", "stroke-dasharray", "stroke-dashoffset", "stroke-linejoin", "stroke-linecap", "stroke-miterlimit",
    "fill-opacity", "stroke-opacity", "opacity", "fill-rule",
}  # fmt: skip
_PLAIN = re.compile(r"[\w\s.,()#:%+-]*")


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
        with matplotlib.rc_context(STYLE):
            self.figure.draw_without_rendering()
        # Each drawing would lay the figure out anew, a little differently.
        self.figure.set_layout_engine("none")

    def svg(self) -> str:
        """For the page; ``title`` and ``caption`` describe it to a screen reader."""
        with matplotlib.rc_context(STYLE):
            file = io.BytesIO()
            self.figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
        return themed_svg(file.getvalue().decode(), self.name)

    def save(self, folder: Path) -> list[Path]:
        """Writes ``NAME.png`` and ``NAME.svg``, on white.

        Raises:
            OutputError: The folder can't be written.
        """
        paths = [folder / f"{self.name}.{suffix}" for suffix in ("png", "svg")]
        with matplotlib.rc_context(STYLE):
            for path in paths:
                save_figure(self.figure, path)
        return paths


def new_figure(height: float, panels: int = 1, *, width: float = WIDTH) -> tuple[Figure, list[Axes]]:
    """A figure with panels below each other. Draw inside ``matplotlib.rc_context(STYLE)``."""
    spacing = ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.05, hspace=0.08)
    figure = Figure(figsize=(width, height), layout=spacing, facecolor=light("paper"))
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    return figure, [bare(panel) for panel in axes]


def bare(axes: Axes) -> Axes:
    """Without a frame above and at the right."""
    axes.set_facecolor(light("paper"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return axes


@functools.cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(STYLE["font.family"])).get_charmap())


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


def share_axis(axes: Axes) -> None:
    """0 to 100 %, with room for a mark at both ends."""
    axes.set_xlim(-0.02, 1.02)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])


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
    for key, value in element.attrib.items():
        _set_attribute(found, key, value, name)
    children = [_clean(child, name) for child in element]
    found.extend([child for child in children if child is not None])
    return found


def _set_attribute(element: ElementTree.Element, key: str, value: str, name: str) -> None:
    if key == "style":
        for declaration in filter(None, map(str.strip, value.split(";"))):
            prop, _, setting = declaration.partition(":")
            _set_property(element, prop.strip(), setting.strip())
    elif key == f"{{{_XLINK}}}href" and value.startswith("#"):
        element.set("href", f"#{name}-{value[1:]}")
    elif key == "id":
        element.set("id", f"{name}-{value}")
    elif key == "clip-path":
        element.set(key, value.replace("url(#", f"url(#{name}-"))
    elif key in _ATTRIBUTES and _PLAIN.fullmatch(value):
        element.set(key, value)
    elif key in ("fill", "stroke", *_PROPERTIES):
        _set_property(element, key, value)
    elif key not in ("version", "type"):
        raise ValueError(f"a drawing must not hold the attribute {key}")


def _set_property(element: ElementTree.Element, name: str, value: str) -> None:
    if name in ("fill", "stroke"):
        if value == "none":
            element.set(name, value)
        elif value.lower() in NAME_OF:
            classes = [*element.get("class", "").split(), f"{name[0]}-{NAME_OF[value.lower()]}"]
            element.set("class", " ".join(classes))
        else:
            raise ValueError(f"the palette has no colour {value}")
    elif name in _PROPERTIES and _PLAIN.fullmatch(value):
        element.set(name, value)
    else:
        raise ValueError(f"a drawing must not set {name}: {value}")


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
