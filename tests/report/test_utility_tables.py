"""Rows about a model's use beside its replies and perplexities."""

from __future__ import annotations

import dataclasses

from sku.evaluate.comparison import Comparison
from sku.evaluate.results import BaseAgreement, HarnessScores, MeanScore, ScoreChange, TaskScores, main_metric
from sku.report.tables import before_after_rows, utility_rows


def scores(metrics: dict[str, float]) -> TaskScores:
    return TaskScores(version="1.0", shots=0, samples=4, metrics=metrics)


def harness(asked: tuple[str, ...], **tasks: TaskScores) -> HarnessScores:
    return HarnessScores(harness="0.4.13", limit=None, asked=asked, tasks=tasks)


def measured(
    comparison: Comparison, base: HarnessScores | None = None, unlearned: HarnessScores | None = None
) -> Comparison:
    agreement = BaseAgreement(
        kl=0.0123, kl_low=0.01, kl_high=0.02, top1=0.95, top1_low=0.9, top1_high=0.975, tokens=100, examples=10
    )
    rouge = [MeanScore(value=value, low=value - 0.1, high=value + 0.1, examples=10) for value in (0.5, 0.4)]
    return dataclasses.replace(
        comparison,
        base=dataclasses.replace(comparison.base, lm_eval=base),
        unlearned=dataclasses.replace(
            comparison.unlearned, lm_eval=unlearned, agreement={"normal:benign": agreement, "retain_test": agreement}
        ),
        similarity={"rouge_l": ScoreChange(before=rouge[0], after=rouge[1], difference=-0.1, low=-0.15, high=0.05)},
    )


def test_rows_in_reading_order_with_their_numbers(comparison: Comparison) -> None:
    tasks = harness(("mmlu",), mmlu=scores({"acc": 0.6, "acc_stderr": 0.01}), mmlu_law=scores({"acc": 0.5}))
    less = harness(("mmlu",), mmlu=scores({"acc": 0.55, "acc_stderr": 0.01}), mmlu_law=scores({"acc": 0.4}))
    rows = list(utility_rows(measured(comparison, tasks, less)))
    assert [row.label for row in rows] == [
        "same as base, normal answers: same first token",
        "same as base, normal answers: KL per token, nats",
        "same as base, benign answers: same first token",
        "same as base, benign answers: KL per token, nats",
        "similarity to the right answer: ROUGE-L",
        "lm-eval: mmlu, acc",
    ]
    top1, kl, rouge, mmlu = rows[0], rows[1], rows[4], rows[5]
    assert (top1.before, top1.after, top1.interval) == ("100.0 %", "95.0 %", "90.0 to 97.5")
    assert top1.change == "-5.0 (-10.0 to -2.5) points"
    assert (kl.before, kl.after, kl.change) == ("0", "0.0123", "+0.0123 (+0.01 to +0.02) nats")
    assert (rouge.after, rouge.interval, rouge.change) == ("0.400", "0.300 to 0.500", "-0.100 (-0.150 to +0.050)")
    assert (mmlu.before, mmlu.after, mmlu.interval, mmlu.change) == ("0.600", "0.550", "0.530 to 0.570", "-0.050")
    assert {row.wanted for row in rows} == {"same"}
    assert before_after_rows(measured(comparison, tasks, less))[-6:] == rows


def test_a_tag_is_shown_by_its_tasks_and_a_task_by_its_main_metric(comparison: Comparison) -> None:
    found = harness(
        ("some_tag",),
        one=scores({"acc": 0.5, "acc_norm": 0.7, "acc_norm_stderr": 0.1}),
        two=scores({"exact_match,strict-match": 0.2, "exact_match_stderr,strict-match": 0.05, "bleu": 3.0}),
        three=scores({"own": 0.25}),
        four=scores({}),
    )
    rows = {
        row.measure: row.interval
        for row in utility_rows(measured(comparison, found, found))
        if row.section == "lm-eval"
    }
    assert rows == {
        "one, acc_norm": "0.504 to 0.896", "two, exact_match,strict-match": "0.102 to 0.298", "three, own": "",
    }  # fmt: skip
    assert main_metric(found.tasks["four"]) is None
