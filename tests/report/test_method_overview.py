"""The overview picture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sku.errors import EvaluationError, OutputError
from sku.evaluate.statistics import Estimate
from sku.report.method_overview import CONTROL, METHOD, Measure, draw_measure, overview_figure
from sku.report.method_tables import ComparisonRow

from .invented_records import failed_record, make_point, make_record

RATE = Measure(field="harmful_unseen", title="Harmful replies", of="forget_test", better="lower")
RATIO = Measure(field="perplexity_normal", title="Perplexity / base", of="normal", better="lower", ratio=True)


def words_of(path: Path) -> list[str]:
    return re.findall(r">([^<>\n]+)</(?:text|tspan)>", path.read_text())


def estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value=value, low=low, high=high)


def row(name: str, found: Estimate, *, control: bool = False) -> ComparisonRow:
    return ComparisonRow(
        name=name, title=name, control=control, failed=False, prefill_tokens=None, prefill_lengths=(), strength=None,
        estimates={RATE.field: found, RATIO.field: found}, utility_cost=None, bound_by="", seeds="",
    )  # fmt: skip


def column(measure: Measure, *rows: ComparisonRow) -> Axes:
    axes = Figure().subplots()
    draw_measure(axes, measure, rows)
    return axes


def dots(axes: Axes) -> list[tuple[Any, ...]]:
    """x, y, marker, colour."""
    drawn: list[Any] = [line for line in axes.lines if line.get_marker() != "None"]
    return [
        (pytest.approx(line.get_xdata()[0]), line.get_ydata()[0], line.get_marker(), line.get_color())
        for line in drawn
    ]


def intervals(axes: Axes) -> list[Any]:
    drawn: list[Any] = [line for line in axes.lines if line.get_color() in (METHOD, CONTROL)]
    return [pytest.approx(tuple(line.get_xdata())) for line in drawn if line.get_marker() == "None"]


def test_a_dot_with_its_interval_in_each_row() -> None:
    axes = column(
        RATE, row("a", estimate(0.1, 0.05, 0.2)), row("b", estimate(1, 0.9, 1)),
        row("base", estimate(0.5, 0.4, 0.6), control=True),
    )  # fmt: skip
    assert dots(axes) == [(10, 0, "o", METHOD), (100, 1, "o", METHOD), (50, 2, "o", CONTROL)]
    assert intervals(axes) == [(5, 20), (90, 100), (40, 60)]
    assert axes.yaxis_inverted(), "the first row stands on top"


def test_ratios_beyond_the_axis_are_told_by_a_number() -> None:
    axes = column(RATIO, row("a", estimate(1.5, 1.2, 9)), row("b", estimate(1.2143e10, 9e9, 2e10)))
    assert axes.get_xscale() == "log"
    assert axes.get_xlim() == pytest.approx((0.9, 2))
    assert [(x, marker) for x, _, marker, _ in dots(axes)] == [(1.5, "o"), (2, ">")]
    assert intervals(axes)[0] == (1.2, 2)
    assert "\u00d71.21e+10" in [text.get_text() for text in axes.texts]


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
