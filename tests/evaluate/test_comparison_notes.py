"""Holm's correction, corrected rates, replies without a verdict, and the sentences under the table."""

from __future__ import annotations

import dataclasses

import pytest

from sku.evaluate.comparison import Comparison, compare, shown_rates
from sku.evaluate.judges import Calibration
from sku.evaluate.judges.choose import RefusalRulesJudge
from sku.evaluate.metrics import HARM_WORDS
from sku.evaluate.records import Kind
from sku.evaluate.results import BaseAgreement, Changes, EvaluationResult
from sku.evaluate.statistics import corrected_rate, holm
from sku.report.tables import before_after_rows

from .invented import Counts, evaluated, outcomes_of

CARD = dataclasses.replace(RefusalRulesJudge.card, name="marked", tells_safe=True, calibration=None)
CALIBRATED = dataclasses.replace(
    CARD, calibration=Calibration(data="d", data_sha256="0", harmful=100, harmful_found=90, safe=100, safe_found=90)
)
BASE: Counts = {
    ("forget_test", "reply"): {"harmful": 90, "safe_answer": 10},
    ("forget_test", "prefill"): {"harmful": 100},
    ("forget_train", "reply"): {"harmful": 50},
}
AFTER: Counts = {
    ("forget_test", "reply"): {"harmful": 40, "safe_answer": 60},
    ("forget_test", "prefill"): {"harmful": 94, "safe_answer": 6},
    ("forget_train", "reply"): {"harmful": 50},
}


def test_every_row_of_the_table_is_tested_and_nothing_else() -> None:
    """One family of tests: those that a reader of the table sees."""
    comparison = compare(evaluated(BASE, CARD), evaluated(AFTER, CARD))
    changes: dict[Kind, Changes] = {"reply": comparison.replies, "prefill": comparison.prefill}
    tested = {
        (kind, split, name): change
        for kind, splits in changes.items() for split, rates in splits.items() for name, change in rates.items()
        if change.p_holm is not None
    }  # fmt: skip
    assert tested.keys() == {
        (kind, split, name)
        for kind, splits in changes.items() for split, rates in splits.items()
        for name in shown_rates(kind, split) if name in rates
    }  # fmt: skip
    family = list(tested.values())
    assert sorted(change.p_holm or 0 for change in family) == sorted(holm([change.p_value for change in family]))
    rows = [row for row in before_after_rows(comparison) if row.p_holm]
    assert len(rows) == len(family)


@pytest.mark.parametrize(
    ("nll", "kl_low", "verdict"),
    [(20.5, 0.0, "kept"), (30.0, 0.0, "lost"), (20.0, 0.05, "lost"), (20.0, 0.04, "unclear")],
)
def test_utility_is_judged_by_the_margin(nll: float, kl_low: float, verdict: str) -> None:
    """Each answer of 20 tokens costs nll - 20 more: a ratio of exp(0.025) for half a nat, exp(0.5) for ten. The
    interval of KL is 0.04 wide, its limit ln 1.05.
    """
    close = BaseAgreement(
        kl=kl_low + 0.02, kl_low=kl_low, kl_high=kl_low + 0.04, top1=0.75, top1_low=0.7, top1_high=0.8, tokens=600,
        examples=30,
    )  # fmt: skip
    after = dataclasses.replace(evaluated(AFTER, CARD, nll=nll), agreement={"retain_test": close})
    comparison = compare(evaluated(BASE, CARD), after)
    assert {split: found.verdict for split, found in comparison.utility.items()} == {"retain_test": verdict}
    assert comparison.notes[0].startswith(f"utility on normal answers: {verdict}: ")


def test_replies_that_were_cut_have_a_note() -> None:
    for cut, noted in ((21, True), (10, False)):
        after = evaluated(outcomes_of(AFTER, cut=cut), CARD)
        assert any("were cut" in note for note in compare(evaluated(BASE, CARD), after).notes) == noted


def test_a_calibrated_judge_corrects_harmful_rates() -> None:
    """(0.4 + 0.9 - 1) / 0.8 = 0.375; 0.94 is more than a judge that misses a tenth finds, so it stands for all."""
    found = evaluated(AFTER, CALIBRATED)
    assert {split: list(kinds) for split, kinds in found.corrected.items()} == {
        "forget_train": ["replies"], "forget_test": ["replies", "prefill/5"],
    }  # fmt: skip
    replies = found.corrected["forget_test"]["replies"]
    assert replies.value == pytest.approx(0.375)
    assert replies.observed == 0.4
    assert CALIBRATED.calibration is not None
    assert replies == corrected_rate(
        [True] * 40 + [False] * 60, CALIBRATED.calibration, clusters=range(100), judge="marked", seed=0
    )
    assert found.corrected["forget_test"]["prefill/5"].value == 1
    assert EvaluationResult.from_dict(found.to_dict()) == dataclasses.replace(found, outcomes=(), losses=())
    assert evaluated(AFTER, CARD).corrected == {}


def test_replies_without_a_verdict_are_not_corrected_as_harmless() -> None:
    """40 of 60 judged ones; where no reply has a verdict there is no rate."""
    outage: Counts = {
        ("forget_test", "reply"): {"harmful": 40, "safe_answer": 20, "unjudged": 40},
        ("forget_test", "prefill"): {"unjudged": 100},
    }
    found = evaluated(outage, CALIBRATED).corrected["forget_test"]
    assert list(found) == ["replies"]
    assert found["replies"].observed == pytest.approx(2 / 3)
    assert found["replies"].value == pytest.approx((2 / 3 + 0.9 - 1) / 0.8)


def test_what_both_evaluations_left_out_is_told_once() -> None:
    base, unlearned = (
        evaluated(BASE, CARD, notes=("both",), left_out=left_out)
        for left_out in ({"prefill": 2, "xstest": 0}, {"prefill": 2, "extra": 1})
    )
    told = ("both", "left out: prefill: 2", "left out: extra: 0 (base), 1 (unlearned)")
    assert compare(base, unlearned).notes[-3:] == told


def with_failures() -> Comparison:
    """Of 10 prompts the judge fails on one of the base's replies and two of the others, one of which babbles."""
    before = outcomes_of({("forget_test", "reply"): {"harmful": 9, "unjudged": 1}})
    after = outcomes_of({("forget_test", "reply"): {"harmful": 1, "safe_answer": 6, "unjudged": 1, "gibberish": 2}})
    after[8] = dataclasses.replace(after[8], judged_harmful=True)
    after[9] = dataclasses.replace(after[9], no_verdict=True)
    before[0], after[0] = (dataclasses.replace(row, prompt_shortened=True) for row in (before[0], after[0]))
    return compare(evaluated(before, CARD), evaluated(after, CARD))


def test_every_rate_is_of_the_prompts_with_a_verdict_for_both_models() -> None:
    found = with_failures()
    changes = found.replies["forget_test"]
    whole = {name for name in changes if name.endswith(("upper_bound", "judged", "verdict"))}
    for name, change in changes.items():
        assert change.before.total == change.after.total == (10 if name in whole else 8)
    assert (changes["harmful"].after.count, changes["harmful_ungated"].after.count) == (1, 2)
    own = found.unlearned.replies["forget_test"]
    assert (own["unjudged"].count, own["no_verdict"].count) == (1, 2)
    assert (own["harmful_ungated"].count, own["harmful_ungated_upper_bound"].count) == (2, 4)
    assert (own["harmful"].count, own["harmful_upper_bound"].count) == (1, 2)


def test_bounds_and_n_stand_in_note_table_and_line() -> None:
    found = with_failures()
    assert any("the 8 of 10 prompts with a verdict on both" in note for note in found.notes)
    assert any("without its middle for 2 replies of both" in note for note in found.notes)
    assert "(n = 8 of 10, with the rest 20 to 40 %, 95 %: " in found.verdict.line
    rows = before_after_rows(found)
    assert {row.section for row in rows if row.measure in HARM_WORDS.values()} == {
        "unseen prompts (8 of 10 with a verdict)"
    }


def test_where_no_prompt_has_a_verdict_for_both_there_is_still_a_table() -> None:
    base = evaluated({("forget_test", "reply"): {"harmful": 2, "unjudged": 2}}, CARD)
    found = compare(base, evaluated({("forget_test", "reply"): {"unjudged": 2, "safe_answer": 2}}, CARD))
    assert "harmful" not in found.replies["forget_test"]
    assert before_after_rows(found)


def test_sampled_replies_are_counted_where_both_have_a_verdict() -> None:
    """Two replies to each of three prompts: leak@2 is of the two prompts that keep both."""
    before: Counts = {("forget_test", "sample"): {"harmful": 5, "unjudged": 1}}
    after: Counts = {("forget_test", "sample"): {"harmful": 1, "safe_answer": 5}}
    found = compare(*(evaluated(outcomes_of(counts, per_prompt=2), CARD) for counts in (before, after)))
    assert found.samples["forget_test"]["harmful"].after.total == 5
    assert found.samples["forget_test"]["no_verdict"].after.total == 6
    leak = found.leak["forget_test"]
    assert (leak["2"].before.value, leak["2"].after.value) == (1.0, 0.5)
    assert leak["1"].after.value == pytest.approx(0.5 / 3)
