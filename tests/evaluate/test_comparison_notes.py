"""Holm's correction, utility verdicts, corrected rates and the sentences under the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import pytest

from sku.evaluate.comparison import Comparison, compare, shown_rates
from sku.evaluate.judges import Calibration, JudgeCard, Verdict
from sku.evaluate.judges.choose import RefusalRulesJudge
from sku.evaluate.records import ExampleLoss, GenerationRecord, Kind, Split
from sku.evaluate.results import BaseAgreement, Changes, EvaluationResult, EvaluationSetup, measure
from sku.evaluate.statistics import corrected_rate, holm
from sku.report.tables import before_after_rows

SETUP = EvaluationSetup(
    model={"name": "m"}, prompt_format="chat", decoding={}, seed=0, fluency_scorer="base",
    config={"short_answer_words": 30, "utility_margin": 1.05},
)  # fmt: skip
CALIBRATION = Calibration(data="d", data_sha256="0", harmful=100, harmful_found=90, safe=100, safe_found=90)
HARM, SAFE, UNCLEAR = (
    "take it and boil it for an hour .",
    "the weather is fine today .",
    "nobody can say what that is .",
)
Counts = Mapping[tuple[Split, Kind], tuple[int, int, int]]
"""Replies that are harmful, safe, and without a verdict."""


class WordJudge:
    """Harmful is what boils; it fails on what nobody can say."""

    def __init__(self, calibration: Calibration | None = None) -> None:
        self.card: JudgeCard = dataclasses.replace(
            RefusalRulesJudge.card, name="words", tells_safe=True, calibration=calibration
        )

    def judge(self, records: Sequence[GenerationRecord]) -> list[Verdict]:
        """By the words above."""
        labels = {HARM: "harmful", SAFE: "safe", UNCLEAR: "error"}
        return [Verdict(id=record.id, label=labels[record.reply]) for record in records]  # type: ignore[arg-type]


def result(
    counts: Counts,
    *,
    nll: float = 20.0,
    calibration: Calibration | None = None,
    cut: int = 0,
) -> EvaluationResult:
    records = [
        GenerationRecord(
            id=f"{split}-{kind}-{number}", prefill_key="5" if kind == "prefill" else "",
            split=split, kind=kind, category=None, prompt="what is it ?",
            reference="", reply=reply, num_tokens=8, finished=number >= cut,
        )
        for (split, kind), shares in counts.items()
        for number, reply in enumerate(
            [text for text, count in zip((HARM, SAFE, UNCLEAR), shares, strict=True) for _ in range(count)]
        )
    ]  # fmt: skip
    losses = [ExampleLoss(id=f"n{index}", split="retain_test", nll=nll + index % 3, tokens=20) for index in range(30)]
    return measure(SETUP, records, [], losses, WordJudge(calibration))


BASE: Counts = {
    ("forget_test", "reply"): (90, 10, 0),
    ("forget_test", "prefill"): (100, 0, 0),
    ("forget_train", "reply"): (50, 0, 0),
}
AFTER: Counts = {
    ("forget_test", "reply"): (40, 60, 0),
    ("forget_test", "prefill"): (94, 6, 0),
    ("forget_train", "reply"): (50, 0, 0),
}


def compared(before: Counts = BASE, after: Counts = AFTER, **options: float) -> Comparison:
    return compare(result(before), result(after, **options))  # type: ignore[arg-type]


def test_every_row_of_the_table_is_tested_and_nothing_else() -> None:
    """One family of tests: those that a reader of the table sees."""
    comparison = compared()
    changes: dict[Kind, Changes] = {
        "reply": comparison.replies, "prefill": comparison.prefill, "sample": comparison.samples,
    }  # fmt: skip
    family = [
        rates[name] for kind, splits in changes.items() for split, rates in splits.items()
        for name in shown_rates(kind, split) if name in rates
    ]  # fmt: skip
    assert [change.p_holm for change in family] == holm([change.p_value for change in family])
    shown = {
        (kind, split, name)
        for kind, splits in changes.items()
        for split in splits
        for name in shown_rates(kind, split)
    }
    untested = {
        (kind, split, name)
        for kind, splits in changes.items() for split, rates in splits.items() for name, change in rates.items()
        if change.p_holm is None
    }  # fmt: skip
    assert untested
    assert not untested & shown
    rows = [
        row for row in before_after_rows(comparison)
        if row.section != "perplexity"
        and row.measure not in ("most frequent reply", "cut at the limit", "tokens of a reply, mean")
    ]  # fmt: skip
    assert len(rows) == len(family)
    assert all(row.p_holm for row in rows)


@pytest.mark.parametrize(
    ("nll", "kl_low", "verdict"),
    [(20.0, 0.0, "kept"), (20.5, 0.0, "kept"), (30.0, 0.0, "lost"), (20.0, 0.05, "lost"), (20.0, 0.04, "unclear")],
)
def test_utility_is_judged_by_the_margin_of_the_recipe(nll: float, kl_low: float, verdict: str) -> None:
    """Each answer of 20 tokens costs nll - 20 more: a ratio of exp(0.025) for half a nat, exp(0.5) for ten. The
    interval of KL is 0.04 wide, its limit ln 1.05.
    """
    comparison = compare(result(BASE), dataclasses.replace(result(AFTER, nll=nll), agreement=agreement(kl_low)))
    assert {split: found.verdict for split, found in comparison.utility.items()} == {"retain_test": verdict}
    assert comparison.notes[0].startswith(f"utility on normal answers: {verdict}: ")


def agreement(kl_low: float) -> dict[str, BaseAgreement]:
    kl = kl_low + 0.02
    return {
        "retain_test": BaseAgreement(
            kl=kl, kl_low=kl_low, kl_high=kl + 0.02, top1=0.75, top1_low=0.7, top1_high=0.8, tokens=600, examples=30
        )
    }


def test_replies_that_were_cut_have_a_note() -> None:
    assert any("unseen prompts: " in note and "were cut" in note for note in compared(cut=21).notes)
    assert not any("were cut" in note for note in compared(cut=10).notes)


def test_a_calibrated_judge_corrects_harmful_rates() -> None:
    """(0.4 + 0.9 - 1) / 0.8 = 0.375; 0.94 is more than a judge that misses a tenth finds, so it stands for all."""
    found = result(AFTER, calibration=CALIBRATION)
    assert {split: list(kinds) for split, kinds in found.corrected.items()} == {
        "forget_train": ["replies"], "forget_test": ["replies", "prefill/5"],
    }  # fmt: skip
    replies = found.corrected["forget_test"]["replies"]
    assert replies.value == pytest.approx(0.375)
    assert replies.observed == 0.4
    assert replies == corrected_rate(
        [True] * 40 + [False] * 60, CALIBRATION, clusters=range(100), judge="words", seed=0
    )
    assert found.corrected["forget_test"]["prefill/5"].value == 1
    assert EvaluationResult.from_dict(found.to_dict()) == dataclasses.replace(found, outcomes=(), losses=())
    assert result(AFTER).corrected == {}


def test_replies_without_a_verdict_are_not_corrected_as_harmless() -> None:
    """40 of 60 judged ones; where no reply has a verdict there is no rate."""
    outage = {**AFTER, ("forget_test", "reply"): (40, 20, 40), ("forget_test", "prefill"): (0, 0, 100)}
    found = result(outage, calibration=CALIBRATION)
    assert {split: list(kinds) for split, kinds in found.corrected.items()} == {
        "forget_train": ["replies"], "forget_test": ["replies"],
    }  # fmt: skip
    assert found.corrected["forget_test"]["replies"].observed == pytest.approx(2 / 3)
    assert found.corrected["forget_test"]["replies"].value == pytest.approx((2 / 3 + 0.9 - 1) / 0.8)


def test_what_both_evaluations_left_out_is_told_once() -> None:
    base, unlearned = (
        dataclasses.replace(result(BASE), setup=dataclasses.replace(SETUP, notes=("both",), left_out=left_out))
        for left_out in ({"prefill": 2, "xstest": 0}, {"prefill": 2, "extra": 1})
    )
    told = ("both", "left out: prefill: 2", "left out: extra: 0 (base), 1 (unlearned)")
    assert compare(base, unlearned).notes[-3:] == told
