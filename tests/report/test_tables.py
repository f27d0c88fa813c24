"""The before/after table, the rows of attacks, and the before/after picture."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from sku.errors import OutputError
from sku.evaluate.comparison import Comparison, compare
from sku.evaluate.judges.choose import RefusalRulesJudge
from sku.evaluate.metrics import Outcome, ReplyOutcome, leaks_of, sample_rates
from sku.evaluate.results import BaseAgreement, EvaluationResult, HarnessScores, MeanScore, ScoreChange, TaskScores
from sku.evaluate.verdict import CANT_MEASURE
from sku.report.figures import before_after_figure
from sku.report.tables import before_after_rows, utility_rows
from sku.report.words import TableRow, attack_rows, relearn_rows

from .conftest import BASE_COUNTS, BASE_LOSSES, UNLEARNED_COUNTS, Counts, ResultMaker
from .html.recorded import attacked, invented_attacks, share


def rows_of(comparison: Comparison) -> dict[str, TableRow]:
    return {row.label: row for row in before_after_rows(comparison)}


def test_rows_hold_shares_intervals_and_changes(comparison: Comparison) -> None:
    rows = rows_of(comparison)
    harmful = rows["trained-on prompts: harmful, by rule"]
    assert (harmful.before, harmful.after, harmful.wanted) == ("98.0 %", "2.0 %", "down")
    low, high = harmful.interval.split(" to ")
    assert 0 < float(low) < 2 < float(high) < 20
    assert harmful.change.startswith("-96.0 (")
    assert rows["trained-on prompts: harmful, judge's own word"].after == "10.0 %"
    assert rows["unseen prompts, prefill, 5 tokens: harmful, judge's own word"].after == "58.0 %"
    assert rows["normal prompts: refused"].after == "4.0 %"
    assert rows["perplexity: trained-on harmful answers"].wanted == "up"
    less = rows_of(dataclasses.replace(comparison, prefill={}, perplexity={}))
    assert not any("prefill" in label or "perplexity" in label for label in less)


def by_the_rules(make_result: ResultMaker, base: Counts, unlearned: Counts) -> dict[str, TableRow]:
    """Judged by the refusal rules, which know no safe answer and call most of them harmful."""
    pair = [
        dataclasses.replace(make_result(name, counts, {"retain_test": 8.0}), judge=RefusalRulesJudge().card)
        for name, counts in (("base", base), ("unlearned", unlearned))
    ]
    return rows_of(compare(*pair))


def test_what_a_judge_never_says_has_no_row(make_result: ResultMaker, comparison: Comparison) -> None:
    measures = {row.measure for row in by_the_rules(make_result, BASE_COUNTS, UNLEARNED_COUNTS).values()}
    assert {"harmful, by rule", "refusal", "gibberish"} <= measures
    assert not measures & {"safe answer", "evasive"}
    assert {"safe answer", "evasive"} <= {row.measure for row in rows_of(comparison).values()}


def test_a_rate_within_the_judges_floor_says_so_in_its_row(make_result: ResultMaker) -> None:
    rows = by_the_rules(
        make_result,
        {("forget_test", "reply"): {"harmful": 46, "refusal": 4}, ("forget_test", "prefill"): {"harmful": 50}},
        {("forget_test", "reply"): {"harmful": 44, "refusal": 6}, ("forget_test", "prefill"): {"refusal": 50}},
    )
    doubted = rows["unseen prompts: harmful, by rule"]
    assert (doubted.after, doubted.change, doubted.caution) == ("88.0 %", CANT_MEASURE, CANT_MEASURE)
    # 50 of 50 lie above the floor only by a bound of 92.9 %, and 0 of 50 can't hide harm.
    assert rows["unseen prompts, prefill, 5 tokens: harmful, by rule"].caution == ""
    assert rows["unseen prompts: refusal"].caution == ""


def test_drawn_replies_have_rows_where_there_are_any(make_result: ResultMaker) -> None:
    """Two prompts with two sampled replies each: one is harmful once, one never; before, all are."""

    def with_samples(name: str, outcomes: list[Outcome]) -> EvaluationResult:
        rows = tuple(
            ReplyOutcome(
                id=f"unseen-sample{index % 2}-p{index // 2}", split="forget_test", kind="sample", category=None,
                outcome=outcome, judged_harmful=outcome == "harmful", finished=True,
            )
            for index, outcome in enumerate(outcomes)
        )  # fmt: skip
        made = make_result(name, BASE_COUNTS, BASE_LOSSES)
        more = {"samples": {"forget_test": sample_rates(rows)}, "leak": {"forget_test": leaks_of(rows)}}
        return dataclasses.replace(made, outcomes=(*made.outcomes, *rows), **more)  # type: ignore[arg-type]

    base = with_samples("base", ["harmful"] * 4)
    unlearned = with_samples("unlearned", ["harmful", "refusal", "refusal", "refusal"])
    rows = rows_of(compare(base, unlearned))
    single = rows["unseen prompts, sampled: harmful, by rule"]
    assert (single.before, single.after) == ("100.0 %", "25.0 %")
    of_two = rows["unseen prompts, sampled: harmful, judge's own word, any of 2"]
    assert (of_two.after, of_two.change) == ("50.0 %", "-50.0 (-100.0 to +0.0) points")


def test_a_comparison_is_a_table_for_people_and_for_pandas(comparison: Comparison) -> None:
    frame = comparison.to_pandas()
    chosen = frame[(frame.split == "forget_test") & (frame.kind == "reply") & (frame.measure == "harmful")]
    change = comparison.replies["forget_test"]["harmful"]
    (row,) = chosen[["base", "unlearned", "change", "low", "high", "n"]].itertuples(index=False, name=None)
    assert row == (change.before.value, change.after.value, change.difference, change.low, change.high, 50)
    assert len(str(comparison).splitlines()) == len(frame) + 1 == comparison._repr_html_().count("<tr")


def harness(asked: str, **tasks: dict[str, float]) -> HarnessScores:
    scores = {name: TaskScores(version="1.0", shots=0, samples=4, metrics=own) for name, own in tasks.items()}
    return HarnessScores(harness="0.4.13", limit=None, asked=(asked,), tasks=scores)


def utility(comparison: Comparison, base: HarnessScores, unlearned: HarnessScores) -> dict[str, TableRow]:
    agreement = BaseAgreement(
        kl=0.0123, kl_low=0.01, kl_high=0.02, top1=0.95, top1_low=0.9, top1_high=0.975, tokens=100, examples=10
    )
    rouge = [MeanScore(value=value, low=value - 0.1, high=value + 0.1, examples=10) for value in (0.5, 0.4)]
    after = dataclasses.replace(comparison.unlearned, lm_eval=unlearned, agreement={"retain_test": agreement})
    measured = dataclasses.replace(
        comparison,
        base=dataclasses.replace(comparison.base, lm_eval=base),
        unlearned=after,
        similarity={"rouge_l": ScoreChange(before=rouge[0], after=rouge[1], difference=-0.1, low=-0.15, high=0.05)},
    )
    rows = list(utility_rows(measured))
    assert before_after_rows(measured)[-len(rows) :] == rows
    return {row.label: row for row in rows}


def test_rows_of_utility(comparison: Comparison) -> None:
    tasks = harness("mmlu", mmlu={"acc": 0.6, "acc_stderr": 0.01}, mmlu_law={"acc": 0.5})
    less = harness("mmlu", mmlu={"acc": 0.55, "acc_stderr": 0.01}, mmlu_law={"acc": 0.4})
    top1, kl, rouge, mmlu = utility(comparison, tasks, less).values()
    assert (top1.after, top1.interval, top1.change) == ("95.0 %", "90.0 to 97.5", "-5.0 (-10.0 to -2.5) points")
    assert (kl.before, kl.after, kl.change) == ("0", "0.0123", "+0.0123 (+0.01 to +0.02) nats")
    assert (rouge.after, rouge.interval, rouge.change) == ("0.400", "0.300 to 0.500", "-0.100 (-0.150 to +0.050)")
    assert (mmlu.before, mmlu.after, mmlu.interval, mmlu.change) == ("0.600", "0.550", "0.530 to 0.570", "-0.050")


def test_a_tag_is_shown_by_its_tasks_and_a_task_by_its_main_metric(comparison: Comparison) -> None:
    found = harness(
        "some_tag", one={"acc": 0.5, "acc_norm": 0.7, "acc_norm_stderr": 0.1}, four={},
        two={"exact_match,strict-match": 0.2, "exact_match_stderr,strict-match": 0.05, "bleu": 3.0},
    )  # fmt: skip
    rows = utility(comparison, found, found)
    assert {label: row.interval for label, row in rows.items() if label.startswith("lm-eval")} == {
        "lm-eval: one, acc_norm": "0.504 to 0.896", "lm-eval: two, exact_match,strict-match": "0.102 to 0.298",
    }  # fmt: skip


def test_rows_of_attacks_hold_both_models_the_mean_of_several_ways_and_both_bounds() -> None:
    rows = attack_rows(
        invented_attacks(
            ("none", "", attacked(0), attacked(10)),
            ("relearn", "1 pair", attacked(2, unjudged=3), attacked(10)),
            ("template", "", attacked(3, ways=5, mean=6), attacked(10, ways=5, mean=45)),
        )
    )
    low, high = 100 * share(3, 10).low, 100 * share(3, 10).high
    assert [row[2:5] for row in rows] == [
        ("0.0 %", "0.0 to 27.8", "100.0 %"),
        ("20.0 to 50.0 %", f"{100 * share(2, 10).low:.1f} to {100 * share(5, 10).high:.1f}", "100.0 %"),
        ("30.0 %", f"{low:.1f} to {high:.1f}", "100.0 %"),
        ("12.0 %", "\u2013", "90.0 %"),
    ]


def test_what_the_judge_makes_of_no_harm_is_not_measurable() -> None:
    """The refusal rules call 92 % of safe replies harmful; 4 of 10 are no more than that, 0 of 10 hide nothing."""
    found = invented_attacks(("none", "", attacked(0), attacked(10)), ("relearn", "5 pairs", attacked(4), attacked(9)))
    calibrated = dataclasses.replace(found, setup=dataclasses.replace(found.setup, judge=RefusalRulesJudge().card))
    assert [row[3] for row in attack_rows(calibrated)] == ["0.0 to 27.8", "not measurable"]


def test_relearning_is_a_number_of_steps_with_what_it_costs() -> None:
    found = invented_attacks()
    few, many = relearn_rows(found)
    assert (few[1:4], many[1:4]) == (("> 8", "0.0002", "30.0 %"), ("8", "5e-05", "60.0 %"))
    assert (few[5:], many[5:]) == (("\u00d71.08", "20.0 %", "90.0 %"), ("\u00d71.08", "20.0 %", "100.0 %"))
    assert relearn_rows(dataclasses.replace(found, relearn=None)) == []


def test_the_picture_says_what_the_result_says(comparison: Comparison, tmp_path: Path) -> None:
    text = before_after_figure(comparison, tmp_path / "figure.svg").read_text()
    words = set(re.findall(r">([^<>\n]+)</text>", text))
    ratio = comparison.perplexity["forget_test"].ratio
    assert {"98 %", "88 %", "76 %", "40 %", "refusal", "unseen prompts, prefill, 5 tokens (n = 50)"} <= words
    assert f"\u00d7{ratio:.3g}" in words
    assert before_after_figure(comparison, tmp_path / "again.svg").read_text() == text
    less = dataclasses.replace(comparison, base=dataclasses.replace(comparison.base, prefill={}), perplexity={})
    assert "prefill" not in before_after_figure(less, tmp_path / "less.svg").read_text()
    for path in ("figure.gif", "missing/figure.png"):
        with pytest.raises(OutputError):
            before_after_figure(comparison, tmp_path / path)
