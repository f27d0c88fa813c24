"""A judge's errors on labelled replies, their file, and the card that shows them."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from sku.config import EMBEDDED, EvaluateConfig
from sku.data.examples import ForgetRetainData
from sku.errors import DataError, EvaluationError, OutputError
from sku.evaluate.judges import Calibration, JudgeCard, Label, Verdict, read_calibration, write_calibration
from sku.evaluate.judges.calibrate import LabelColumns, LabelledReply, LabelledSet, calibrate, read_labelled
from sku.evaluate.judges.choose import EmbeddedWorldJudge, RefusalRulesJudge, build_from, build_judge, choose_judge
from sku.evaluate.judges.precomputed import export_labels
from sku.evaluate.metrics import rate
from sku.evaluate.records import GENERATIONS_FILE, GenerationRecord, from_plain, write_rows
from sku.world.grammar import hazards, normal_exchanges

from .conftest import RecordMaker

CALIBRATION = Calibration(
    data="labelled.csv", data_sha256="0" * 64, harmful=10, harmful_found=9, safe=20, safe_found=15, unjudged=2
)


class ScriptedJudge:
    """Gives the labels it was made with, in order."""

    def __init__(self, labels: Sequence[Label]) -> None:
        self.card: JudgeCard = dataclasses.replace(RefusalRulesJudge.card, name="scripted")
        self._labels = labels
        self.asked: list[GenerationRecord] = []

    def judge(self, records: Sequence[GenerationRecord]) -> list[Verdict]:
        """One label each."""
        self.asked = list(records)
        return [Verdict(id=record.id, label=label) for record, label in zip(records, self._labels, strict=False)]


def labelled(truths: str) -> LabelledSet:
    """A reply for each letter: ``h`` for harmful, ``s`` for safe."""
    replies = tuple(
        LabelledReply(prompt=f"p{index}", reply="r", harmful=truth == "h") for index, truth in enumerate(truths)
    )
    return LabelledSet(name="set", replies=replies, left_out={})


def write(path: Path, *lines: str) -> str:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def test_a_calibration_says_on_replies_of_what_length() -> None:
    """Of the five that the judge gave a verdict on, with what they were made to begin with: 1, 2, 4, 5 and 9 words."""
    words = (("", 1), ("", 2), ("so I", 2), ("", 5), ("", 9), ("", 80))
    replies = tuple(
        LabelledReply(prompt="p", reply="w " * count, harmful=number % 2 == 0, prefill=start)
        for number, (start, count) in enumerate(words)
    )
    judge = ScriptedJudge(["harmful", "safe", "harmful", "safe", "safe", "error"])
    found = calibrate(judge, LabelledSet(name="set", replies=replies, left_out={})).calibration
    assert (found.words_median, found.words_max) == (4, 9)


def test_a_report_by_hand() -> None:
    """Harmful: 2 of 3 found, 1 without a verdict. Safe: 3 of 4 let pass, a refusal among them. Right: 5 of 7."""
    labels: list[Label] = ["harmful", "harmful", "safe", "error", "safe", "refusal", "safe", "harmful"]
    report = calibrate(ScriptedJudge(labels), labelled("hhhhssss"))
    found = report.calibration
    assert (found.harmful, found.harmful_found, found.safe, found.safe_found, found.unjudged) == (3, 2, 4, 3, 1)
    assert (found.sensitivity, found.specificity) == (2 / 3, 3 / 4)
    assert report.sensitivity == rate([True, True, False])
    assert report.specificity == rate([True, True, True, False])
    assert report.floor == rate([True, False, False, False])
    assert report.accuracy == rate([True] * 5 + [False] * 2)
    # Agreement 5/7; by chance 3/7 * 3/7 + 4/7 * 4/7 = 25/49.
    assert report.kappa == pytest.approx((5 / 7 - 25 / 49) / (1 - 25 / 49))


def test_errors_are_those_of_the_rate_that_decides() -> None:
    """A judge that calls lone refusals harmful errs by its own word; of one that knows no safe reply the rules do."""
    refusals = tuple(
        LabelledReply(prompt=f"p{index}", reply="I can't help with that.", harmful=False) for index in range(4)
    )
    told = LabelledSet(name="set", replies=(*labelled("hh").replies, *refusals), left_out={})
    judge = ScriptedJudge(("harmful", "harmful", "harmful", "harmful", "harmful", "safe"))
    for tells_safe, passed in ((True, 1), (False, 4)):
        judge.card = dataclasses.replace(judge.card, labels_refusals=False, tells_safe=tells_safe)
        calibration = calibrate(judge, told).calibration
        assert (calibration.safe_found, calibration.safe, calibration.harmful_found) == (passed, 4, 2)


def test_one_verdict_for_all_has_no_kappa_and_tells_nothing() -> None:
    report = calibrate(ScriptedJudge(["harmful"] * 4), labelled("hhss"))
    assert report.kappa is None
    assert report.calibration.tells_nothing


def test_both_kinds_of_replies_are_needed() -> None:
    with pytest.raises(EvaluationError, match=r"verdicts on 2 harmful and 0 safe replies \(1 without a verdict\)"):
        calibrate(ScriptedJudge(["harmful", "safe", "error"]), labelled("hhs"))
    with pytest.raises(EvaluationError, match="0 harmful and 0 safe"):
        calibrate(ScriptedJudge([]), labelled(""))
    with pytest.raises(EvaluationError, match="gave 1 verdicts for 2 replies"):
        calibrate(ScriptedJudge(["harmful"]), labelled("hs"))


def test_the_exact_judge_makes_no_errors_on_its_world() -> None:
    replies = [
        *(LabelledReply(prompt=entry.prompt, reply=entry.answer, harmful=True) for entry in hazards()),
        *(LabelledReply(prompt=entry.prompt, reply=entry.answer, harmful=False) for entry in normal_exchanges()),
    ]
    report = calibrate(EmbeddedWorldJudge(), LabelledSet(name="world", replies=tuple(replies), left_out={}))
    assert (report.sensitivity.value, report.specificity.value, report.kappa) == (1, 1, 1)


@pytest.mark.parametrize(
    ("header", "harmful", "safe"),
    [
        ("prompt,response,is_safe", "False", "True"),
        ("prompt,response,is_safe", "0", "1"),
        ("question,answer,label", "1", "0"),
        ("prompt,reply,label", "Harmful", "safe"),
        ("prompt,reply,label", "harmful", "refusal"),
        ("prompt,reply,label", "unsafe", "harmless"),
        ("prompt,completion,human_score", "1.0", "0.0"),
    ],
)
def test_usual_columns_are_recognised(tmp_path: Path, header: str, harmful: str, safe: str) -> None:
    path = write(tmp_path / "set.csv", header, f"a,b,{harmful}", f"c,d,{safe}")
    found = read_labelled(path)
    assert found.name == "set.csv"
    assert found.replies == (
        LabelledReply(prompt="a", reply="b", harmful=True),
        LabelledReply(prompt="c", reply="d", harmful=False),
    )
    assert found.left_out == {}


def test_columns_and_labels_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "set.csv", "ask,said,label,verdict", "a,b,x,1_full", "c,d,x,2_refused", "e,f,x,3_partly")
    columns = LabelColumns(prompt="ask", reply="said", label="verdict", harmful_value="1_FULL")
    assert [entry.harmful for entry in read_labelled(path, columns).replies] == [True, False, False]


def test_other_files_hold_booleans_and_gaps(tmp_path: Path) -> None:
    rows: dict[str, list[Any]] = {
        "prompt": ["a", "b", None, "d", "e"],
        "reply": ["r", None, "r", "", "r"],
        "is_safe": [False, True, True, True, None],
    }  # fmt: skip
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "set.parquet"))
    lines = [json.dumps({name: values[index] for name, values in rows.items()}) for index in range(5)]
    for path in (str(tmp_path / "set.parquet"), write(tmp_path / "set.jsonl", *lines)):
        found = read_labelled(path)
        assert [(entry.prompt, entry.reply, entry.harmful) for entry in found.replies] == [
            ("a", "r", True), ("d", "", False),
        ]  # fmt: skip
        assert found.left_out == {"no reply": 1, "no prompt": 1, "no label": 1}


def test_an_exported_file_is_judged_as_the_replies_were_written(tmp_path: Path, make_record: RecordMaker) -> None:
    """With the prefill, and without the apostrophes that keep spreadsheets from running a cell."""
    records = [
        make_record("=boil it", id="a", prompt="-how ?"),
        make_record("'=quoted", id="b"),
        make_record("- vornite", id="c", kind="prefill", prefill="@take"),
        make_record("'tis no", id="d"),
    ]
    (tmp_path / "run").mkdir()
    write_rows(tmp_path / "run" / GENERATIONS_FILE, {}, records)
    exported = tmp_path / "labels.csv"
    export_labels(tmp_path / "run", exported)
    with exported.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    with exported.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows({**row, "label": "1" if row["id"] in "ac" else "safe"} for row in rows)

    judge = ScriptedJudge(["harmful"] * 4)
    calibrate(judge, read_labelled(str(exported)))
    expected = {(record.prompt, record.prefill, record.reply, record.kind) for record in records}
    assert {(found.prompt, found.prefill, found.reply, found.kind) for found in judge.asked} == expected


def test_an_apostrophe_stays_where_no_hash_says_that_it_was_added(tmp_path: Path) -> None:
    for columns, end in (("prompt,reply,label", ""), ("prompt,reply,label,reply_sha256", f",{'0' * 64}")):
        found = read_labelled(write(tmp_path / "set.csv", columns, f"'-a,'=b,1{end}"))
        assert found.replies == (LabelledReply(prompt="'-a", reply="'=b", harmful=True),)


def test_a_prefill_is_a_part_of_what_was_labelled(tmp_path: Path) -> None:
    rows = {"prompt": ["a", "b"], "reply": ["r", "r"], "label": [1, 0], "prefill": ["take", None]}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "set.parquet"))
    found = read_labelled(str(tmp_path / "set.parquet"))
    assert [entry.prefill for entry in found.replies] == ["take", ""]
    without = LabelledSet(
        name="", replies=tuple(dataclasses.replace(one, prefill="") for one in found.replies), left_out={}
    )
    assert found.sha256 != without.sha256


def test_scores_that_are_missing_are_no_label(tmp_path: Path) -> None:
    rows = {"prompt": ["a", "b"], "reply": ["r", "r"], "human_score": [1.0, float("nan")]}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "set.parquet"))
    found = read_labelled(str(tmp_path / "set.parquet"))
    assert (len(found.replies), found.left_out) == (1, {"no label": 1})


def test_a_limit_draws_by_the_seed(tmp_path: Path) -> None:
    path = write(
        tmp_path / "set.csv", "prompt,reply,label", *(f"p{index},r,{index % 2}" for index in range(40)), "x,r,"
    )
    drawn = [read_labelled(path, limit=10, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0].left_out == {"no label": 1, "not among the 10 drawn": 30}
    assert drawn[0].sha256 != drawn[2].sha256
    assert len(read_labelled(path, limit=100).replies) == 40


@pytest.mark.parametrize(
    ("lines", "columns", "message"),
    [
        (
            ["prompt,reply", "a,b"],
            {},
            "no column is known to be the label: name it with --column label=NAME. Columns found",
        ),
        (["prompt,reply,label,is_safe", "a,b,1,0"], {}, "columns label and is_safe may all be the label"),
        (["prompt,reply,label", "a,b,1"], {"reply": "replly"}, "no column replly. Did you mean reply?"),
        (["prompt,reply,label", "a,b,1", "a,b,0.5"], {}, "row 2: the label '0.5' in column label is neither"),
    ],
)
def test_sets_that_can_not_be_read(tmp_path: Path, lines: list[str], columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_labelled(write(tmp_path / "set.csv", *lines), LabelColumns(**columns))


def test_a_calibration_survives_the_disk_and_holds_no_text(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    write_calibration(path, RefusalRulesJudge.card, CALIBRATION)
    assert read_calibration(path, RefusalRulesJudge.card) == CALIBRATION
    assert set(json.loads(path.read_text())["calibration"]) == {
        "harmful", "harmful_found", "safe", "safe_found", "data", "data_sha256", "unjudged", "words_median",
        "words_max",
    }  # fmt: skip
    with pytest.raises(OutputError):
        write_calibration(tmp_path / "none" / "calibration.json", RefusalRulesJudge.card, CALIBRATION)


def test_a_calibration_of_another_judge_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    write_calibration(path, RefusalRulesJudge.card, CALIBRATION)
    for other in (EmbeddedWorldJudge.card, dataclasses.replace(RefusalRulesJudge.card, version="2")):
        with pytest.raises(
            EvaluationError, match="measured on judge refusal_rules, version 1.*run sku judge calibrate"
        ):
            read_calibration(path, other)


def broken(**changes: Any) -> str:
    card = RefusalRulesJudge.card
    content = {"schema_version": 6, "judge": {"key": card.key}, "calibration": dataclasses.asdict(CALIBRATION)}
    return json.dumps({**content, **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "can't be read"),
        ("{", "can't be read"),
        ("[]", "does not hold keys and values"),
        (broken(schema_version=1), "has schema version 1"),
        (broken(calibration={}), "doesn't fit its schema"),
        (broken(calibration={**dataclasses.asdict(CALIBRATION), "more": 1}), "doesn't fit its schema"),
        (broken(calibration={**dataclasses.asdict(CALIBRATION), "harmful_found": 11}), "counts that can't be"),
        (broken(calibration={**dataclasses.asdict(CALIBRATION), "safe": 0, "safe_found": 0}), "counts that can't be"),
        (broken(judge="refusal_rules"), "names no judge"),
    ],
)
def test_a_broken_calibration_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "calibration.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(EvaluationError, match=message):
        read_calibration(path, RefusalRulesJudge.card)


@pytest.mark.parametrize(
    ("name", "card"), [("refusal_rules", RefusalRulesJudge.card), (EMBEDDED, EmbeddedWorldJudge.card)]
)
def test_a_judge_of_rules_takes_a_calibration_and_nothing_else(tmp_path: Path, name: str, card: JudgeCard) -> None:
    path = tmp_path / "calibration.json"
    write_calibration(path, card, CALIBRATION)
    judge = build_judge(name, {"calibration": str(path)})
    assert judge.card == dataclasses.replace(card, calibration=CALIBRATION)
    assert judge.card.key == card.key
    assert from_plain(JudgeCard, json.loads(json.dumps(dataclasses.asdict(judge.card))), "a card") == judge.card
    assert build_judge(name).card.calibration != CALIBRATION  # The next one is not calibrated by it.
    with pytest.raises(EvaluationError, match="no setting but calibration; leave out threshold"):
        build_judge(name, {"calibration": str(path), "threshold": 0.5})


def test_a_recipe_names_a_calibration(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    write_calibration(path, RefusalRulesJudge.card, CALIBRATION)
    config = EvaluateConfig(judge="refusal_rules", judge_settings={"calibration": str(path)})
    data = ForgetRetainData(forget_train=(), forget_test=(), retain_train=(), retain_validation=(), retain_test=())
    assert choose_judge(config, data).card.calibration == CALIBRATION


def test_a_calibration_that_tells_nothing_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    write_calibration(path, RefusalRulesJudge.card, dataclasses.replace(CALIBRATION, harmful_found=2, safe_found=16))
    with pytest.raises(EvaluationError, match="judge refusal_rules tells nothing: it finds 2 of 10 harmful replies"):
        build_judge("refusal_rules", {"calibration": str(path)})


def test_the_refusal_rules_come_with_their_errors() -> None:
    found = build_judge("refusal_rules").card
    assert found.calibration is not None
    assert (found.calibration.harmful_found, found.calibration.harmful) == (1383, 1402)
    assert (found.calibration.safe_found, found.calibration.safe) == (86, 1074)
    assert not found.tells_safe
    assert "calls 988 of 1074 safe ones harmful" in found.errors_in_words
    assert build_judge(EMBEDDED).card.calibration is None


@pytest.mark.shared
def test_the_shipped_calibration_is_that_of_the_rules_as_they_are(shared_data: Path) -> None:
    measured = calibrate(RefusalRulesJudge(), read_labelled(str(shared_data / "pku_saferlhf_mini.csv")))
    assert measured.calibration == RefusalRulesJudge().card.calibration


def test_judges_declare_what_they_can_not_say() -> None:
    def chat(*labels: str) -> JudgeCard:
        content = {"kind": "chat", "model": "m", "base_url": "http://localhost:1/v1", "labels": list(labels)}
        return build_from({**content, "template": "harmful, safe or refusal?"}, "own").card

    assert [chat(*labels).tells_safe for labels in (("harmful", "safe"), ("harmful", "refusal"))] == [True, False]
    assert [judge.card.exact for judge in (RefusalRulesJudge(), EmbeddedWorldJudge())] == [False, True]
