"""Records of a comparison: what they hold, what they refuse, and how an evaluation becomes a point."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sku.errors import EvaluationError
from sku.evaluate.metrics import Outcome
from sku.evaluate.utility_cost import BROKEN_COST
from sku.report.method_records import (
    LETTERS,
    NORMAL_KEY,
    MethodRecord,
    Point,
    asked_of,
    point_from_result,
    read_records,
    tokens_of,
)

from .conftest import UNLEARNED_COUNTS, UNLEARNED_LOSSES, ResultMaker
from .invented_records import failed_record, invented_comparison, make_point, make_record, spent

POINT = make_point("hred", prefill="uh", normal="aod", exact="1-0", losses={"forget_test": (1.5, 2.25)})


def write(folder: Path, *records: MethodRecord) -> None:
    for record in records:
        (folder / record.file_name).write_text(json.dumps(record.to_dict(), allow_nan=False))


def test_a_record_comes_back_from_its_file(tmp_path: Path) -> None:
    matched = dataclasses.replace(POINT, strength=0.4, roles=("matched", "sweep"), utility=spent(1.04))
    record = make_record("sku", POINT, matched)
    write(tmp_path, record)
    assert read_records(tmp_path) == [record]


def test_the_file_is_short_and_says_what_it_holds() -> None:
    plain = make_record("sku", make_point("hr", losses={"forget_test": (1.23456, 2.0)})).to_dict()
    assert plain["schema_version"] == 6
    assert plain["tokens"] == {"forget_test": "10 10"}
    assert plain["points"][0]["outcomes"] == {"forget_test/reply": "hr"}
    assert plain["points"][0]["losses"] == {"forget_test": "1.2346 2.0000"}
    assert len(json.dumps(plain, indent=2).splitlines()) < 60


def test_records_are_sorted_by_name_and_seed(tmp_path: Path) -> None:
    records = [make_record("npo", POINT, seed=10), make_record("npo", POINT, seed=2), make_record("base", POINT)]
    write(tmp_path, *records)
    assert [record.file_name for record in read_records(tmp_path)] == [
        "base--seed0.json", "npo--seed2.json", "npo--seed10.json",
    ]  # fmt: skip


def test_every_letter_stands_for_one_outcome() -> None:
    assert set(LETTERS) == set(Outcome.__args__)  # type: ignore[attr-defined]
    assert len(set(LETTERS.values())) == len(LETTERS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"outcomes": {"forget_test/reply": "hx"}, "judged": {"forget_test/reply": "10"}, "exact": ""},
            "from h, r, e, s, d, u",
        ),
        (
            {"outcomes": {"forget_test/reply": "ha"}, "judged": {"forget_test/reply": "10"}, "exact": ""},
            "from h, r, e, s, d, u",
        ),
        ({"outcomes": {NORMAL_KEY: "ah"}, "judged": {}, "exact": "--"}, "from a, o, d"),
        ({"outcomes": {"unsen/reply": "h"}, "judged": {}, "exact": ""}, "unknown key"),
        ({"judged": {"forget_test/reply": "1000"}}, "judged is not a 0, 1 or - for each"),
        (
            {"judged": {"forget_test/reply": "100", "forget_test/prefill/5": "01"}},
            "judged is not a 0, 1 or - for each",
        ),
        (
            {"judged": {"forget_test/reply": "1002", "forget_test/prefill/5": "01"}},
            "judged is not a 0, 1 or - for each",
        ),
        ({"exact": "1-"}, "exact is not"),
        ({"exact": "1-x"}, "exact is not"),
        ({"roles": ()}, "roles are not from published, matched, sweep"),
        ({"roles": ("best",)}, "roles are not from"),
        ({"strength": float("nan")}, "not finite"),
        ({"utility": dataclasses.replace(spent(1.04), cost=BROKEN_COST)}, "not finite"),
        ({"utility": dataclasses.replace(spent(1.04), kl={"retain_validation": float("nan")})}, "not finite"),
        ({"losses": {"forget_test": (1.0, float("inf"))}}, "not finite"),
    ],
)
def test_points_that_contradict_themselves_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        dataclasses.replace(POINT, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "running"}, "neither complete nor failed"),
        ({"status": "failed"}, "needs a failure of one line"),
        ({"failure": "the loss is NaN"}, "needs a failure of one line"),
        ({"status": "failed", "failure": "one\ntwo"}, "needs a failure of one line"),
        ({"points": ()}, "at least one point"),
        ({"points": (POINT, POINT)}, "the same role"),
        ({"asked": {"forget_test/reply": "f"}}, "asked other things"),
        ({"points": (POINT, make_point("hh", prefill="uh", normal="aod", roles=["sweep"]))}, "numbers of replies"),
        ({"tokens": {"forget_test": (10,)}}, "numbers of answers"),
        ({"tokens": {"forget_test": (10, 0)}}, "no token"),
    ],
)
def test_records_that_contradict_themselves_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message) as caught:
        make_record("sku", POINT, **changes) if "points" not in changes else dataclasses.replace(
            make_record("sku", POINT), **changes
        )
    assert "sku--seed0.json" in str(caught.value)


def test_a_control_without_a_model_has_no_losses() -> None:
    record = make_record("always_refuse", make_point("rr"), tokens={"forget_test": (10, 10)}, control=True)
    assert record.points[0].losses == {}


def edit(plain: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**plain, **changes}


BREAKS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "other version": (lambda plain: edit(plain, schema_version=1), "schema version 1, this SKU reads 6"),
    "no object": (lambda plain: [plain], "does not hold keys and values"),
    "unknown key": (lambda plain: edit(plain, extra=1), "missing or unknown fields extra"),
    "missing key": (lambda plain: {name: plain[name] for name in plain if name != "judge"}, "unknown fields judge"),
    "wrong type": (lambda plain: edit(plain, seed="0", control=1), "control is of the wrong type"),
    "no numbers": (lambda plain: edit(plain, tokens={"forget_test": "10 1.5"}), "tokens are not numbers"),
    "point key": (lambda plain: edit(plain, points=[{**plain["points"][0], "loss": 1}]), "point 1 .* fields loss"),
    "point no object": (lambda plain: edit(plain, points=["h"]), "point 1 .*does not hold keys and values"),
    "point type": (lambda plain: edit(plain, points=[{**plain["points"][0], "strength": True}]), "strength is of"),
    "role type": (lambda plain: edit(plain, points=[{**plain["points"][0], "roles": [[]]}]), "of the wrong type"),
    "loss type": (lambda plain: edit(plain, points=[{**plain["points"][0], "losses": {"a": [1]}}]), "losses are"),
    "utility key": (
        lambda plain: edit(plain, points=[{**plain["points"][0], "utility": {"kl": {}}}]),
        "point 1 .*utility has missing or unknown fields",
    ),
    "point letter": (
        lambda plain: edit(plain, points=[{**plain["points"][0], "outcomes": {"forget_test/reply": "?"}}]),
        "point 1: .*from h",
    ),
    "name": (lambda plain: edit(plain, name="npo"), "holds the record npo--seed0.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_broken_files_are_refused_in_one_line_that_names_the_file(name: str, tmp_path: Path) -> None:
    change, message = BREAKS[name]
    (tmp_path / "sku--seed0.json").write_text(json.dumps(change(make_record("sku", POINT).to_dict())))
    with pytest.raises(EvaluationError, match=message) as caught:
        read_records(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "sku--seed0.json"))
    assert "\n" not in str(caught.value)


def test_no_record_and_no_json_are_refused(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(EvaluationError, match="holds no record"):
        read_records(tmp_path)
    (tmp_path / "sku--seed0.json").write_text("{")
    with pytest.raises(EvaluationError, match="can't be read"):
        read_records(tmp_path)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"asked": dict.fromkeys(POINT.outcomes, "0" * 64)}, "prompts"),
        ({"tokens": {"forget_test": (10, 11)}}, "fixed answers"),
        ({"judge": {"name": "embedded", "version": "1"}}, "judges"),
    ],
)
def test_records_that_were_asked_different_things_are_refused(
    changes: dict[str, Any], what: str, tmp_path: Path
) -> None:
    write(tmp_path, make_record("base", POINT), make_record("npo", POINT, seed=1, **changes))
    with pytest.raises(EvaluationError, match=rf"base--seed0.json and npo--seed1.json .* different {what}"):
        read_records(tmp_path)


def test_failed_records_and_controls_without_losses_fit_to_any(tmp_path: Path) -> None:
    control = dataclasses.replace(POINT, losses={})
    write(tmp_path, make_record("a", control), make_record("base", POINT), failed_record("npo", 0, "the loss is NaN"))
    assert len(read_records(tmp_path)) == 6


def test_the_invented_comparison_fits_together(tmp_path: Path) -> None:
    records = invented_comparison(["sku", "npo"], seeds=2, prompts=8)
    write(tmp_path, *records)
    assert {record.file_name for record in read_records(tmp_path)} == {record.file_name for record in records}


def test_an_evaluation_becomes_a_point_in_the_order_of_ids(make_result: ResultMaker) -> None:
    result = make_result("m", UNLEARNED_COUNTS, UNLEARNED_LOSSES)
    shuffled = dataclasses.replace(result, outcomes=result.outcomes[::-1], losses=result.losses[::-1])
    point = point_from_result(shuffled, 0.5, ["sweep", "matched"], spent(1.02))
    assert point == point_from_result(result, 0.5, ["sweep", "matched"], spent(1.02))
    own = {row.id: row for row in result.outcomes if (row.split, row.kind) == ("forget_test", "prefill")}
    assert point.outcomes["forget_test/prefill/5"] == "".join(LETTERS[own[key].outcome] for key in sorted(own))
    assert point.judged["forget_test/prefill/5"] == "".join(str(int(own[key].judged_harmful)) for key in sorted(own))
    assert point.outcomes[NORMAL_KEY].count("o") == 2
    assert point.exact.count("1") == 48
    assert point.exact.count("0") == 2
    assert NORMAL_KEY not in point.judged
    assert asked_of(result)["forget_test/prefill/5"] == hashlib.sha256("\n".join(sorted(own)).encode()).hexdigest()
    losses = {row.id: row.nll for row in result.losses if row.split == "forget_test"}
    assert point.losses["forget_test"] == tuple(losses[key] for key in sorted(losses))
    assert tokens_of(result)["forget_test"] == (10,) * 20
    record = make_record("sku", point, asked=asked_of(result), tokens=tokens_of(result))
    assert Point.from_dict(record.to_dict()["points"][0]).outcomes == point.outcomes


def test_exact_marks(make_result: ResultMaker) -> None:
    result = make_result("m", {("retain_test", "reply"): {"answered": 2}}, UNLEARNED_LOSSES)
    first, second = result.outcomes
    result = dataclasses.replace(result, outcomes=(first, dataclasses.replace(second, exact=None)))
    assert point_from_result(result, 1, ["published"], None).exact == "1-"


def test_an_evaluation_without_rows_is_no_point(make_result: ResultMaker) -> None:
    result = dataclasses.replace(make_result("m", UNLEARNED_COUNTS, UNLEARNED_LOSSES), outcomes=())
    with pytest.raises(EvaluationError, match="without replies"):
        point_from_result(result, 1.0, ["published"], None)
