"""The overview picture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from sku.errors import EvaluationError, OutputError
from sku.evaluate.statistics import Estimate
from sku.report.method_overview import METHOD, Measure, draw_measure, overview_figure
from sku.report.method_tables import ComparisonRow

from .invented_records import failed_record, make_point, make_record


def test_dots_stand_where_the_numbers_are_and_those_beyond_the_axis_are_told() -> None:
    rows = [
        ComparisonRow(
            name="a", title="a", control=False, failed=False, prefill_tokens=None, prefill_lengths=(), strength=None,
            estimates={"ratio": Estimate(value=value, low=0.8 * value, high=9 * value)}, utility_cost=None,
            bound_by="", seeds="",
        )
        for value in (1.5, 1.2143e10)
    ]  # fmt: skip
    axes = Figure().subplots()
    draw_measure(axes, Measure(field="ratio", title="Perplexity / base", of="normal", ratio=True), rows)
    drawn: list[Any] = [line for line in axes.lines if line.get_color() == METHOD]
    dots = [(*line.get_xdata(), *line.get_ydata(), line.get_marker()) for line in drawn[1::2]]
    assert dots == [(1.5, 0, "o"), (2, 1, ">")]
    assert list(drawn[0].get_xdata()) == pytest.approx([1.2, 2])
    assert "\u00d71.21e+10" in [text.get_text() for text in axes.texts]


def words_of(path: Path) -> list[str]:
    return re.findall(r">([^<>\n]+)</(?:text|tspan)>", path.read_text())


def test_svg_names_rows_and_measures(tmp_path: Path) -> None:
    point = make_point("hr", prefill="hr", normal="ao", exact="10", losses={"retain_test": (10, 11)})
    records = [make_record(name, point) for name in ("sku", "npo")] + [make_record("base", point, control=True)]
    path = overview_figure(records, tmp_path / "figure.svg")
    words = words_of(path)
    assert [word for word in words if word in ("sku", "npo", "base")] == ["sku", "npo", "base"]
    assert ("Exact answers" in words, "Over-refusal" in words) == (True, False)
    assert overview_figure(records, tmp_path / "b.svg").read_bytes() == path.read_bytes()
    less = [
        make_record("base", make_point("hh", normal="aa", losses={"retain_test": (10, 10)}), control=True),
        make_record("npo", make_point("rr", normal="ao", losses={"retain_test": (11, 11)})),
        failed_record("npo", 2, "NaN"), failed_record("lost", 0, "NaN"),
    ]  # fmt: skip
    words = words_of(overview_figure(less, path))
    assert ("Exact answers" in words, "Over-refusal" in words) == (False, True)
    assert words.count("failed") == 4, "the row of lost, in each column"
    assert "npo: 1/2 failed: NaN" in " ".join(words)
    for wrong in ("figure.gif", "missing/figure.png"):
        with pytest.raises(OutputError):
            overview_figure(less, tmp_path / wrong)
    with pytest.raises(EvaluationError):
        overview_figure([failed_record("sku", 0, "NaN")], path)
