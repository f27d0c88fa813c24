"""Figures of a page."""

from __future__ import annotations

from pathlib import Path

from sku.report.figures import PALETTE, drawable
from sku.report.page import Page


def luminance(colour: str) -> float:
    """Relative luminance by WCAG 2."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_names_are_drawn_on_one_line_and_with_what_the_font_has() -> None:
    drawn = [drawable(text) for text in ("a\n\tb", "\U0001f9ea \u6f22 x", "$x^2$", "a" * 99)]
    assert drawn == ["a b", "\ufffd \ufffd x", "$x^2$", f"{'a' * 33}\u2026"]


def test_colours_have_the_contrast_of_wcag_aa() -> None:
    assert min(contrast(PALETTE[text], PALETTE["paper"]) for text in ("ink", "muted")) >= 4.5
    assert min(contrast(PALETTE[mark], PALETTE["paper"]) for mark in ("base", "unlearned", "harm", "second")) >= 3
    for bar in ("harmful", "evasive", "safe_answer", "gibberish", "unjudged"):
        assert contrast(PALETTE[bar], PALETTE["on_bright"]) >= 4.5, bar
    assert contrast(PALETTE["refusal"], PALETTE["on_deep"]) >= 4.5


def test_every_picture_becomes_two_files_and_the_same_ones_again(page: Page, tmp_path: Path) -> None:
    names = [
        "outcomes", "normal", "perplexity", "frontier", "training", "attacks",
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
