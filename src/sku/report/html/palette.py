"""Colours of a report: one name each, with a value for light pages and one for dark pages.

Figures are drawn in the light values. In the page each value becomes a class of its name, so that a picture follows
the theme. Text on white or on the dark page has a contrast of at least 4.5, marks of at least 3.
"""

from __future__ import annotations

from dataclasses import dataclass


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
    # Bars of outcomes carry their own text, so they stay as they are: Okabe and Ito's colours.
    "harmful": Colour(light="#d55e00", dark="#d55e00"),
    "evasive": Colour(light="#e0c070", dark="#e0c070"),
    "safe_answer": Colour(light="#56b4e9", dark="#56b4e9"),
    "refusal": Colour(light="#0072b2", dark="#0072b2"),
    "degenerate": Colour(light="#8c8c8c", dark="#8c8c8c"),
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
