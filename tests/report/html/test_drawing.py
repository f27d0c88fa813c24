"""Figures as SVG of a page: nothing but shapes, every colour by name."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from sku.report.figures import PALETTE, drawable, theme_css, themed_svg
from sku.report.page import Page

HEAD = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="1pt" height="1pt">'


def luminance(colour: str) -> float:
    """Relative luminance by WCAG 2."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_have_the_contrast_of_wcag_aa(theme: str) -> None:
    colours = {name: str(getattr(colour, theme)) for name, colour in PALETTE.items()}
    for text in ("ink", "muted", "accent"):
        assert min(contrast(colours[text], colours[page]) for page in ("paper", "panel")) >= 4.5, text
    for mark in ("base", "unlearned", "harm", "second", "third", "fourth"):
        assert contrast(colours[mark], colours["paper"]) >= 3, mark
    for bar in ("harmful", "evasive", "safe_answer", "gibberish", "unjudged"):
        assert contrast(colours[bar], colours["on_bright"]) >= 4.5, bar
    assert contrast(colours["refusal"], colours["on_deep"]) >= 4.5


def test_every_colour_has_its_classes() -> None:
    css = theme_css()
    for name in PALETTE:
        assert f".f-{name}{{fill:var(--{name})}}" in css
    assert len({colour.light for colour in PALETTE.values()}) == len(PALETTE)


@pytest.mark.parametrize(
    ("inside", "words"),
    [
        ("<script>1</script>", "<script>"),
        ("<foreignObject/>", "<foreignObject>"),
        ('<path onclick="1"/>', "onclick"),
        ('<use xlink:href="https://a.b/c"/>', "href"),
        ('<path style="fill: #123456"/>', "no colour #123456"),
        ('<path style="fill: url(https://a.b)"/>', "no colour url"),
        ('<path style="background: red"/>', "must not hold background"),
        ('<path d="M 0 0 &quot;&gt;"/>', "must not hold d"),
    ],
)
def test_a_drawing_holds_shapes_alone(inside: str, words: str) -> None:
    with pytest.raises(ValueError, match="drawing|palette") as caught:
        themed_svg(f"{HEAD}{inside}</svg>", "a")
    assert words in str(caught.value)


def test_ids_comments_and_styles_of_a_drawing() -> None:
    inside = '<!-- text --><style>*{}</style><metadata/><path id="m" style="fill: #1f2328; stroke: none"/>'
    svg = themed_svg(f'{HEAD}{inside}<use xlink:href="#m" x="1"/></svg>', "name")
    assert "text" not in svg
    assert "style" not in svg
    assert 'id="name-m"' in svg
    assert 'href="#name-m"' in svg
    assert 'class="f-ink"' in svg
    assert 'aria-labelledby="name-title"' in svg


def test_names_are_drawn_on_one_line_and_with_what_the_font_has() -> None:
    assert drawable("a\n\tb") == "a b"
    assert drawable("\U0001f9ea \u6f22 x") == "\ufffd \ufffd x"
    assert len(drawable("a" * 99)) == 34
    assert drawable("$x^2$") == "$x^2$"


def test_every_picture_becomes_two_files_and_the_same_ones_again(page: Page, tmp_path: Path) -> None:
    names = [
        "outcomes", "normal", "perplexity", "frontier", "training", "task_vector", "attacks",
        "cost_to_break",
    ]  # fmt: skip
    assert [picture.name for picture in page.pictures] == names
    for picture in page.pictures[:2]:
        png, svg = picture.save(tmp_path)
        before = svg.read_bytes()
        assert png.read_bytes().startswith(b"\x89PNG")
        assert b"<!DOCTYPE svg" in before
        picture.save(tmp_path)
        assert svg.read_bytes() == before
    for picture in page.pictures:
        assert picture.rows
        assert {len(row) for row in picture.rows} == {len(picture.columns)}


def test_layers_stand_in_the_order_of_their_numbers(page: Page) -> None:
    (picture,) = (picture for picture in page.pictures if picture.name == "task_vector")
    layers = [row[1] for row in picture.rows if row[0] == "decoder layer"]
    assert layers == ["2", "10", "others"]
    (training,) = (picture for picture in page.pictures if picture.name == "training")
    steps = [int(row[0]) for row in training.rows]
    assert (steps[0], steps[-1]) == (1, 30)
    assert all(one < other for one, other in pairwise(steps))
