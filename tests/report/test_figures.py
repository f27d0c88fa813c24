"""The before/after picture."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from sku.errors import OutputError
from sku.evaluate.comparison import Comparison
from sku.report.figures import light
from sku.report.result_charts import before_after_figure


def test_svg_says_what_the_result_says(comparison: Comparison, tmp_path: Path) -> None:
    text = before_after_figure(comparison, tmp_path / "figure.svg").read_text()
    words = set(re.findall(r">([^<>\n]+)</text>", text))
    assert {"98 %", "88 %", "76 %", "40 %", "base", "unlearned"} <= words
    assert {"harmful", "refusal", "evasive", "gibberish"} <= words
    assert "unseen prompts, prefill, 5 tokens (n = 50)" in words
    assert any("tiny-base / tiny-unlearned. Judge: refusal_rules, an upper bound" in entry for entry in words)
    ratio = comparison.perplexity["forget_test"].ratio
    assert f"\u00d7{ratio:.3g}" in words
    assert "not judged" not in words
    assert all(light(name) in text for name in ("harmful", "evasive", "refusal", "gibberish"))


def test_the_same_comparison_gives_the_same_file(comparison: Comparison, tmp_path: Path) -> None:
    first = before_after_figure(comparison, tmp_path / "a.svg").read_bytes()
    assert before_after_figure(comparison, tmp_path / "b.svg").read_bytes() == first


def test_what_was_not_measured_leaves_its_place_empty(comparison: Comparison, tmp_path: Path) -> None:
    base = dataclasses.replace(comparison.base, prefill={})
    less = dataclasses.replace(comparison, base=base, perplexity={}, replies={})
    text = before_after_figure(less, tmp_path / "figure.svg").read_text()
    assert "prefill" not in text
    assert ">unseen prompts (n = 50)<" in text


def test_other_suffixes_and_folders_are_refused(comparison: Comparison, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"must end in \.png"):
        before_after_figure(comparison, tmp_path / "figure.gif")
    with pytest.raises(OutputError, match="can't be written"):
        before_after_figure(comparison, tmp_path / "missing" / "figure.png")
