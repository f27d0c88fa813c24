"""The before/after picture."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from sku.errors import OutputError
from sku.evaluate.comparison import Comparison
from sku.report.figures import PALETTE, before_after_figure


def test_svg_says_what_the_result_says(comparison: Comparison, tmp_path: Path) -> None:
    text = before_after_figure(comparison, tmp_path / "figure.svg").read_text()
    words = set(re.findall(r">([^<>\n]+)</text>", text))
    assert {"98 %", "88 %", "76 %", "40 %", "base", "unlearned"} <= words
    assert {"harmful", "refusal", "evasive", "gibberish"} <= words
    assert "unseen prompts, prefill, 5 tokens (n = 50)" in words
    ratio = comparison.perplexity["forget_test"].ratio
    assert f"\u00d7{ratio:.3g}" in words
    assert all(PALETTE[name] in text for name in ("harmful", "evasive", "refusal", "gibberish"))
    assert before_after_figure(comparison, tmp_path / "again.svg").read_text() == text
    less = dataclasses.replace(comparison, base=dataclasses.replace(comparison.base, prefill={}), perplexity={})
    assert "prefill" not in before_after_figure(less, tmp_path / "less.svg").read_text()
    for path in ("figure.gif", "missing/figure.png"):
        with pytest.raises(OutputError):
            before_after_figure(comparison, tmp_path / path)
