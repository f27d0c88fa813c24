"""The trade-off picture."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sku.report.trade_off import panels_of, trade_off_figure

from sku.errors import EvaluationError, OutputError
from sku.report.method_records import MethodRecord

from .invented_records import METHODS, STRENGTHS, failed_record, invented_comparison, make_point, make_record


@pytest.fixture(scope="module")
def records() -> list[MethodRecord]:
    return invented_comparison(seeds=2, prompts=20)


def words_of(path: Path) -> list[str]:
    return re.findall(r">([^<>\n]+)</(?:text|tspan)>", path.read_text())


def test_png(records: list[MethodRecord], tmp_path: Path) -> None:
    path = trade_off_figure(records, tmp_path / "figure.png", budget=1.05)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_svg_names_every_row_and_sign(records: list[MethodRecord], tmp_path: Path) -> None:
    words = words_of(trade_off_figure(records, tmp_path / "figure.svg", budget=1.05, order=METHODS))
    titles = [name.replace("_", " ") for name in METHODS]
    assert [word for word in words if word in titles] == titles
    assert {"Replies", "Replies after the worst prefill", "perplexity budget, \u00d71.05"} <= set(words)
    assert {"base", "random direction", "as published", "best within the utility budget"} <= set(words)
    assert any(word.startswith("Means over 2 seeds. Stars: 95 % intervals over seeds and prompts.") for word in words)


def test_the_same_records_give_the_same_file(records: list[MethodRecord], tmp_path: Path) -> None:
    first = trade_off_figure(records, tmp_path / "a.svg").read_bytes()
    assert trade_off_figure(records, tmp_path / "b.svg").read_bytes() == first


def test_curves_are_means_over_seeds_by_strength() -> None:
    def seed(number: int, *letters: str) -> MethodRecord:
        points = [
            make_point(text, losses={"retain_test": (10 + 2 * strength,) * 2}, strength=strength, roles=["sweep"])
            for strength, text in zip((2.0, 1.0), letters, strict=True)
        ]
        return make_record("sku", *points, seed=number)

    base = make_record("base", make_point("hh", losses={"retain_test": (10, 10)}), control=True)
    (own, control) = panels_of([[seed(0, "rr", "hh"), seed(1, "hr", "rh")], [base]])["reply"]
    assert [place.y.value for place in own.line] == [0.75, 0.25]
    assert [place.x.value for place in own.line if place.x] == pytest.approx([2.718281828**0.2, 2.718281828**0.4])
    assert own.published is None
    assert own.best is None
    assert control.published is not None
    assert control.published.y.value == 1


def test_strengths_that_a_seed_lacks_are_no_part_of_the_line(records: list[MethodRecord]) -> None:
    sku = [record for record in records if record.name == "sku"]
    short = make_record("sku", *sku[1].points[:3], seed=1)
    base = [record for record in records if record.name == "base"]
    both, less = (panels_of([row, base])["reply"][0] for row in (sku, [sku[0], short]))
    assert len(both.line) == len(STRENGTHS)
    assert len(less.line) == 3


def test_failures_are_told(records: list[MethodRecord], tmp_path: Path) -> None:
    more = [*records, failed_record("sku", 2, "NaN"), failed_record("lost", 0, "NaN")]
    text = " ".join(words_of(trade_off_figure(more, tmp_path / "figure.svg")))
    assert "Not every seed is complete: sku (2 of 3)." in text
    assert "Not drawn, as no seed is complete: lost." in text
    assert "lost" not in words_of(tmp_path / "figure.svg")


def test_ruined_models_stand_on_the_border(tmp_path: Path) -> None:
    base = make_record("base", make_point("hh", losses={"retain_test": (10, 10)}), control=True)
    point = make_point("rr", losses={"retain_test": (1e6, 1e6)}, roles=["published", "matched", "sweep"])
    text = " ".join(words_of(trade_off_figure([base, make_record("ga", point)], tmp_path / "figure.svg")))
    assert "What lies beyond \u00d710 stands on the right border." in text
    point = make_point("rr", losses={"retain_test": (11, 11)})
    text = " ".join(words_of(trade_off_figure([base, make_record("ga", point)], tmp_path / "figure.svg")))
    assert "border" not in text
    assert "Stars" not in text


def test_panels_that_were_not_measured_are_left_out(tmp_path: Path) -> None:
    records = [make_record("base", make_point("hh", losses={"retain_test": (10, 10)}), control=True)]
    words = words_of(trade_off_figure(records, tmp_path / "figure.svg"))
    assert [word for word in words if word.startswith("Replies")] == ["Replies"]
    silent = [make_record("base", make_point(losses={"retain_test": (10, 10)}), control=True)]
    with pytest.raises(EvaluationError, match="no complete record has a harmful rate .*: nothing to draw"):
        trade_off_figure(silent, tmp_path / "figure.svg")


def test_refusals(records: list[MethodRecord], tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"must end in \.png"):
        trade_off_figure(records, tmp_path / "figure.gif")
    with pytest.raises(OutputError, match="can't be written"):
        trade_off_figure(records[-4:], tmp_path / "missing" / "figure.png")
    with pytest.raises(EvaluationError, match="no complete record is named base"):
        trade_off_figure([record for record in records if record.name == "sku"], tmp_path / "figure.png")
