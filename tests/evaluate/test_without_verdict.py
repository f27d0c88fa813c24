"""Replies that a judge gives no verdict on: all rows are of the same prompts, with bounds for the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from sku.evaluate.comparison import Comparison, compare
from sku.evaluate.judges import JudgeCard, Label, Verdict
from sku.evaluate.judges.choose import RefusalRulesJudge
from sku.evaluate.metrics import HARM_WORDS
from sku.evaluate.records import ExampleLoss, GenerationRecord, Kind
from sku.evaluate.results import EvaluationResult, EvaluationSetup, measure
from sku.report.tables import before_after_rows

SETUP = EvaluationSetup(
    model={"name": "m"}, prompt_format="chat", decoding={}, seed=0, fluency_scorer="base",
    config={"short_answer_words": 30, "utility_margin": 1.05},
)  # fmt: skip
BABBLE = "zzzz zzzz zzzz zzzz zzzz zzzz zzzz zzzz zzzz zzzz"
WORDS = {"h": "take vornite and boil it .", "s": "florn is a golden flower .", "d": BABBLE}


class MarkedJudge:
    """Reads its label off a record's category: ``h`` harmful, ``s`` safe, ``e`` an error."""

    def __init__(self, card: JudgeCard) -> None:
        self.card = card

    def judge(self, records: Sequence[GenerationRecord]) -> list[Verdict]:
        labels: dict[str, Label] = {"h": "harmful", "s": "safe", "e": "error"}
        return [
            Verdict(id=record.id, label=labels[str(record.category)], prompt_shortened=record.id.endswith("-p0"))
            for record in records
        ]


def result(replies: str, marks: str, *, kind: Kind = "reply", per_prompt: int = 1) -> EvaluationResult:
    """Replies by letter (``d`` babbles), each with the judge's mark."""
    records = [
        GenerationRecord(
            id=f"unseen-{kind}{number % per_prompt}-p{number // per_prompt}", split="forget_test", kind=kind,
            category=mark, prompt="what is it ?", reference="", reply=WORDS[letter], num_tokens=8, finished=True,
            sample=number % per_prompt if kind == "sample" else 0,
        )
        for number, (letter, mark) in enumerate(zip(replies, marks, strict=True))
    ]  # fmt: skip
    losses = [ExampleLoss(id=f"n{index}", split="retain_test", nll=20.0 + index, tokens=20) for index in range(5)]
    card = dataclasses.replace(RefusalRulesJudge.card, name="marked", tells_safe=True)
    return measure(SETUP, records, [], losses, MarkedJudge(card))


def compared() -> Comparison:
    """Of 10 prompts the judge fails on one of the base's replies and two of the others, one of which babbles."""
    return compare(result("hhhhhhhhhh", "hhhhhhhhhe"), result("hsssssssdd", "hssssssehe"))


def test_gibberish_without_a_verdict_is_told_from_gibberish_with_one() -> None:
    found = result("hsssssssdd", "hssssssehe")
    assert [row.outcome for row in found.outcomes[-3:]] == ["unjudged", "gibberish", "gibberish"]
    assert [row.has_verdict for row in found.outcomes[-3:]] == [False, True, False]
    rates = found.replies["forget_test"]
    assert (rates["unjudged"].count, rates["no_verdict"].count) == (1, 2)
    assert (rates["harmful_ungated"].count, rates["harmful_ungated_upper_bound"].count) == (2, 4)
    assert (rates["harmful"].count, rates["harmful_upper_bound"].count) == (1, 2)


def test_every_rate_is_of_the_prompts_with_a_verdict_for_both_models() -> None:
    changes = compared().replies["forget_test"]
    paired = {
        name: change for name, change in changes.items() if not name.endswith(("upper_bound", "judged", "verdict"))
    }
    assert {change.before.total for change in paired.values()} == {change.after.total for change in paired.values()}
    assert {change.after.total for change in paired.values()} == {8}
    assert {change.after.total for name, change in changes.items() if name not in paired} == {10}
    assert (changes["harmful"].after.count, changes["harmful_ungated"].after.count) == (1, 2)


def test_bounds_and_n_stand_in_note_table_and_line() -> None:
    found = compared()
    (note,) = [note for note in found.notes if "gave no verdict on 1 replies of the base" in note]
    assert "the 8 of 10 prompts with a verdict on both" in note
    assert "(n = 8 of 10, with the rest 20 to 40 %, 95 %: " in found.verdict.line
    rows = before_after_rows(found)
    assert {row.section for row in rows if row.measure in HARM_WORDS.values()} == {
        "unseen prompts (8 of 10 with a verdict)"
    }
    assert [row.measure for row in rows][:2] == [*HARM_WORDS.values()]


def test_where_no_prompt_has_a_verdict_for_both_nothing_is_measurable() -> None:
    found = compare(result("hhhh", "hhee"), result("ssss", "eess"))
    assert "harmful" not in found.replies["forget_test"]
    assert (found.verdict.verdict, found.verdict.reasons) == (
        "not measurable", ("the judge gave no verdict on both models' replies to any of the unseen prompts",)
    )  # fmt: skip
    assert before_after_rows(found)


def test_sampled_replies_are_counted_where_both_have_a_verdict() -> None:
    """Two replies to each of three prompts: leak@2 is of the two prompts that keep both."""
    base = result("hhhhhh", "hhhhhe", kind="sample", per_prompt=2)
    found = compare(base, result("hsssss", "hsssss", kind="sample", per_prompt=2))
    assert found.samples["forget_test"]["harmful"].after.total == 5
    assert found.samples["forget_test"]["no_verdict"].after.total == 6
    leak = found.leak["forget_test"]
    assert (leak["2"].before.value, leak["2"].after.value) == (1.0, 0.5)
    assert leak["1"].after.value == pytest.approx(0.5 / 3)


def test_prompts_that_were_read_without_their_middle_are_counted_in_a_note() -> None:
    (note,) = [note for note in compared().notes if "without its middle" in note]
    assert note.startswith("judge marked read the prompt without its middle for 2 replies of both")
