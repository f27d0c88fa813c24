"""A judge's errors on labelled replies, their file, and the card that shows them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from sku.config import EMBEDDED
from sku.data.tables import NOT_WANTED
from sku.errors import DataError, EvaluationError
from sku.evaluate.judges import Calibration, JudgeCard, Label, Verdict, write_calibration
from sku.evaluate.judges.calibrate import (
    LabelColumns,
    LabelledReply,
    LabelledSet,
    calibrate,
    read_labelled,
)
from sku.evaluate.judges.choose import EmbeddedWorldJudge, RefusalRulesJudge, build_judge
from sku.evaluate.metrics import rate
from sku.evaluate.records import GenerationRecord, from_plain

CALIBRATION = Calibration(
    data="labelled.csv", data_sha256="0" * 64, harmful=10, harmful_found=9, safe=20, safe_found=15, unjudged=2
)


class ScriptedJudge:
    """Gives the labels it was made with, in order."""

    def __init__(self, labels: Sequence[Label]) -> None:
        self.card: JudgeCard = dataclasses.replace(RefusalRulesJudge.card, name="scripted")
        self._labels = labels

    def judge(self, records: Sequence[GenerationRecord]) -> list[Verdict]:
        """One label each."""
        return [Verdict(id=record.id, label=label) for record, label in zip(records, self._labels, strict=False)]


def labelled(truths: str) -> LabelledSet:
    """A reply for each letter: ``h`` for harmful, ``s`` for safe."""
    replies = (LabelledReply(prompt=f"p{index}", reply="r", harmful=one == "h") for index, one in enumerate(truths))
    return LabelledSet(name="set", replies=tuple(replies), left_out={})


def write(path: Path, *lines: str) -> str:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def test_a_report_by_hand() -> None:
    """Harmful: 2 of 3 found, 1 without a verdict. Safe: 3 of 4 let pass, a refusal among them. Right: 5 of 7."""
    labels: list[Label] = ["harmful", "harmful", "safe", "error", "safe", "refusal", "safe", "harmful"]
    report = calibrate(ScriptedJudge(labels), labelled("hhhhssss"))
    found = report.calibration
    assert found is not None
    assert (found.harmful, found.harmful_found, found.safe, found.safe_found, found.unjudged) == (3, 2, 4, 3, 1)
    assert (found.sensitivity, found.specificity) == (2 / 3, 3 / 4)
    assert report.figures.sensitivity == rate([True, True, False])
    assert report.figures.specificity == rate([True, True, True, False])
    assert report.figures.accuracy == rate([True] * 5 + [False] * 2)
    # Agreement 5/7; by chance 3/7 * 3/7 + 4/7 * 4/7 = 25/49.
    assert report.kappa == pytest.approx((5 / 7 - 25 / 49) / (1 - 25 / 49))


@pytest.mark.parametrize(("tells_safe", "passed"), [(True, 1), (False, 4)])
def test_errors_are_those_of_the_rate_that_decides(tells_safe: bool, passed: int) -> None:
    """A judge that calls lone refusals harmful errs by its own word; of one that knows no safe reply the rules do."""
    refusals = (LabelledReply(prompt=f"p{n}", reply="I can't help with that.", harmful=False) for n in range(4))
    told = LabelledSet(name="set", replies=(*labelled("hh").replies, *refusals), left_out={})
    judge = ScriptedJudge(["harmful", "harmful", "harmful", "harmful", "harmful", "safe"])
    judge.card = dataclasses.replace(judge.card, labels_refusals=False, tells_safe=tells_safe)
    found = calibrate(judge, told).calibration
    assert found is not None
    assert (found.safe_found, found.safe, found.harmful_found) == (passed, 4, 2)


def test_one_verdict_for_all_has_no_kappa_and_tells_nothing() -> None:
    report = calibrate(ScriptedJudge(["harmful"] * 4), labelled("hhss"))
    assert report.calibration is not None
    assert report.calibration.tells_nothing
    assert report.kappa is None


def test_both_kinds_of_replies_are_needed_unless_one_is_said_to_be_all() -> None:
    cases: list[tuple[list[Label], str]] = [(["harmful", "safe", "error"], "hhs"), ([], ""), (["harmful"], "hs")]
    for labels, truths in cases:
        with pytest.raises(EvaluationError, match="scripted"):
            calibrate(ScriptedJudge(labels), labelled(truths))
    alone = calibrate(ScriptedJudge(["harmful", "safe", "safe"]), labelled("sss"), one_kind=True)
    assert (alone.calibration, alone.kappa, alone.figures.sensitivity) == (None, None, None)
    assert alone.figures.specificity == rate([False, True, True])


@pytest.mark.parametrize(
    ("header", "harmful", "safe"),
    [
        ("prompt,response,is_safe", "False", "1"),
        ("question,answer,label", "Harmful", "refusal"),
        ("prompt,completion,human_score", "1.0", "0.0"),
    ],
)
def test_usual_columns_are_recognised(tmp_path: Path, header: str, harmful: str, safe: str) -> None:
    found = read_labelled(write(tmp_path / "set.csv", header, f"a,b,{harmful}", f"c,d,{safe}"))
    assert (found.name, found.left_out) == ("set.csv", {})
    assert [(one.prompt, one.reply, one.harmful) for one in found.replies] == [("a", "b", True), ("c", "d", False)]


def test_other_files_hold_booleans_prefills_and_gaps(tmp_path: Path) -> None:
    rows: dict[str, list[Any]] = {
        "prompt": ["a", "b", None, "d", "e"],
        "reply": ["r", None, "r", "", "r"],
        "is_safe": [0.0, 1.0, 1.0, 1.0, float("nan")],
        "prefill": ["take", None, None, None, None],
    }
    path = tmp_path / "set.parquet"
    datasets.Dataset.from_dict(rows).to_parquet(str(path))
    found = read_labelled(str(path))
    assert found.replies == (
        LabelledReply(prompt="a", reply="r", harmful=True, prefill="take"),
        LabelledReply(prompt="d", reply="", harmful=False),
    )
    assert found.left_out == {"no reply": 1, "no prompt": 1, "no label": 1}
    plain = dataclasses.replace(found, replies=tuple(dataclasses.replace(one, prefill="") for one in found.replies))
    assert found.sha256 != plain.sha256


def test_rows_are_chosen_by_columns_and_drawn_by_the_seed(tmp_path: Path) -> None:
    rows = (f"p{index},r{index},{index % 2},{'ab'[index // 40]},MIT" for index in range(80))
    path = write(tmp_path / "set.csv", "prompt,reply,label,part,licence", *rows, "x,r,,a,")
    chosen = LabelColumns(where={"part": ("a", "c")})
    drawn = [read_labelled(path, chosen, limit=10, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    assert drawn[0].left_out == {NOT_WANTED: 40, "no label": 1, "not among the 10 drawn": 30}
    assert drawn[0].licences == {"MIT"}
    assert drawn[0].sha256 != drawn[2].sha256


@pytest.mark.parametrize(
    ("lines", "named", "offending"),
    [
        (["prompt,reply", "a,b"], {}, "label"),
        (["prompt,reply,label,is_safe", "a,b,1,0"], {}, "is_safe"),
        (["prompt,reply,label", "a,b,1"], {"named": {"reply": "replly"}}, "replly"),
        (["prompt,reply,label", "a,b,1"], {"where": {"prat": ("x",)}}, "prat"),
        (["prompt,reply,label", "a,b,1", "a,b,0.5"], {}, "row 2"),
    ],
)
def test_sets_that_can_not_be_read(tmp_path: Path, lines: list[str], named: dict[str, Any], offending: str) -> None:
    with pytest.raises(DataError, match=offending):
        read_labelled(write(tmp_path / "set.csv", *lines), LabelColumns(**named))


def broken(**changes: Any) -> str:
    content = {"schema_version": 6, "judge": {"key": RefusalRulesJudge.card.key}}
    return json.dumps({**content, "calibration": dataclasses.asdict(CALIBRATION), **changes})


def miscounted(**changes: Any) -> str:
    return broken(calibration={**dataclasses.asdict(CALIBRATION), **changes})


@pytest.mark.parametrize(
    "text",
    [
        None, "{", broken(schema_version=1), broken(calibration={}), miscounted(more=1), miscounted(harmful_found=11),
        miscounted(safe=0, safe_found=0), broken(judge={"key": EmbeddedWorldJudge.card.key}),
        miscounted(harmful_found=2, safe_found=16),
    ],
)  # fmt: skip
def test_a_calibration_that_is_broken_or_of_another_judge_or_tells_nothing(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "calibration.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(EvaluationError, match="calibrat"):
        build_judge("refusal_rules", {"calibration": str(path)})


@pytest.mark.parametrize(
    ("name", "card"), [("refusal_rules", RefusalRulesJudge.card), (EMBEDDED, EmbeddedWorldJudge.card)]
)
def test_a_judge_of_rules_takes_a_calibration_and_nothing_else(tmp_path: Path, name: str, card: JudgeCard) -> None:
    path = tmp_path / "calibration.json"
    write_calibration(path, card, CALIBRATION)
    assert json.loads(path.read_text())["calibration"] == dataclasses.asdict(CALIBRATION)
    judge = build_judge(name, {"calibration": str(path)})
    assert judge.card == dataclasses.replace(card, calibration=CALIBRATION)
    assert judge.card.key == card.key
    assert from_plain(JudgeCard, json.loads(json.dumps(dataclasses.asdict(judge.card))), "a card") == judge.card
    assert build_judge(name).card.calibration != CALIBRATION  # The next one is not calibrated by it.
    with pytest.raises(EvaluationError, match="threshold"):
        build_judge(name, {"calibration": str(path), "threshold": 0.5})


def test_the_refusal_rules_come_with_their_errors() -> None:
    found = build_judge("refusal_rules").card.calibration
    assert found is not None
    assert (found.harmful_found, found.harmful, found.safe_found, found.safe) == (1383, 1402, 86, 1074)
    assert not RefusalRulesJudge.card.tells_safe
    assert build_judge(EMBEDDED).card.calibration is None


@pytest.mark.shared
def test_the_shipped_calibration_is_that_of_the_rules_as_they_are(shared_data: Path) -> None:
    measured = calibrate(RefusalRulesJudge(), read_labelled(str(shared_data / "pku_saferlhf_mini.csv")))
    assert measured.calibration == RefusalRulesJudge().card.calibration
