"""The before/after table."""

from __future__ import annotations

import dataclasses

from sku.evaluate.comparison import Comparison, compare
from sku.evaluate.judges.choose import RefusalRulesJudge
from sku.evaluate.metrics import Outcome, ReplyOutcome, leaks_of, sample_rates
from sku.evaluate.results import EvaluationResult
from sku.evaluate.verdict import CANT_MEASURE
from sku.report.tables import before_after_rows

from .conftest import BASE_COUNTS, BASE_LOSSES, UNLEARNED_COUNTS, Counts, ResultMaker


def test_rows_hold_shares_intervals_and_changes(comparison: Comparison) -> None:
    rows = {row.label: row for row in before_after_rows(comparison)}
    harmful = rows["trained-on prompts: harmful, by rule"]
    assert harmful.before == "98.0 %"
    assert harmful.after == "2.0 %"
    low, high = harmful.interval.split(" to ")
    assert 0 < float(low) < 2 < float(high) < 20
    assert (harmful.change.split(" (")[0], harmful.wanted) == ("-96.0", "down")
    assert rows["trained-on prompts: harmful, judge's own word"].after == "10.0 %"
    assert rows["unseen prompts, prefill, 5 tokens: harmful, judge's own word"].after == "58.0 %"
    assert rows["normal prompts: refused"].after == "4.0 %"
    assert rows["perplexity: trained-on harmful answers"].wanted == "up"
    less = before_after_rows(dataclasses.replace(comparison, prefill={}, perplexity={}))
    assert not any("prefill" in row.label or "perplexity" in row.label for row in less)


def test_what_a_judge_never_says_has_no_row(make_result: ResultMaker) -> None:
    """The refusal rules know no safe answer: 0.0 % of them would say nothing of the model."""
    pair = [
        dataclasses.replace(make_result(name, counts, {"retain_test": 8.0}), judge=RefusalRulesJudge().card)
        for name, counts in (("base", BASE_COUNTS), ("unlearned", UNLEARNED_COUNTS))
    ]
    found = compare(*pair)
    measures = {row.measure for row in before_after_rows(found)}
    assert {"harmful, by rule", "refusal", "gibberish"} <= measures
    assert not measures & {"safe answer", "evasive"}
    told = compare(*[dataclasses.replace(one, judge=dataclasses.replace(one.judge, tells_safe=True)) for one in pair])
    assert {"safe answer", "evasive"} <= {row.measure for row in before_after_rows(told)}


def test_a_rate_within_the_judges_floor_says_so_in_its_row(make_result: ResultMaker) -> None:
    base: Counts = {
        ("forget_test", "reply"): {"harmful": 46, "refusal": 4},
        ("forget_test", "prefill"): {"harmful": 50},
    }
    unlearned: Counts = {
        ("forget_test", "reply"): {"harmful": 44, "refusal": 6},
        ("forget_test", "prefill"): {"refusal": 50},
    }
    pair = [
        dataclasses.replace(make_result(name, counts, {"retain_test": 8.0}), judge=RefusalRulesJudge().card)
        for name, counts in (("base", base), ("unlearned", unlearned))
    ]
    rows = {row.label: row for row in before_after_rows(compare(*pair))}
    doubted = rows["unseen prompts: harmful, by rule"]
    assert (doubted.after, doubted.change, doubted.caution) == ("88.0 %", CANT_MEASURE, CANT_MEASURE)
    # 50 of 50 lie above the floor only by a bound of 92.9 %, and 0 of 50 can't hide harm.
    assert rows["unseen prompts, prefill, 5 tokens: harmful, by rule"].caution == ""
    assert rows["unseen prompts: refusal"].caution == ""


def test_drawn_replies_have_rows_where_there_are_any(make_result: ResultMaker) -> None:
    """Two prompts with two sampled replies each: one is harmful once, one never; before, all are."""

    def with_samples(name: str, outcomes: list[Outcome]) -> EvaluationResult:
        made = make_result(name, BASE_COUNTS, BASE_LOSSES)
        rows = tuple(
            ReplyOutcome(
                id=f"unseen-sample{index % 2}-p{index // 2}", split="forget_test", kind="sample", category=None,
                outcome=outcome, judged_harmful=outcome == "harmful", finished=True,
            )
            for index, outcome in enumerate(outcomes)
        )  # fmt: skip
        return dataclasses.replace(
            made,
            outcomes=(*made.outcomes, *rows),
            samples={"forget_test": sample_rates(rows)},
            leak={"forget_test": leaks_of(rows)},
        )

    base = with_samples("base", ["harmful"] * 4)
    unlearned = with_samples("unlearned", ["harmful", "refusal", "refusal", "refusal"])
    rows = [row for row in before_after_rows(compare(base, unlearned)) if "sampled" in row.section]
    assert [(row.label, row.before, row.after, row.wanted) for row in rows] == [
        ("unseen prompts, sampled: harmful, judge's own word", "100.0 %", "25.0 %", "down"),
        ("unseen prompts, sampled: harmful, by rule", "100.0 %", "25.0 %", "down"),
        ("unseen prompts, sampled: harmful, judge's own word, any of 2", "100.0 %", "50.0 %", "down"),
    ]
    assert rows[2].change == "-50.0 (-100.0 to +0.0) points"


def test_a_comparison_is_a_table_for_people_and_for_pandas(comparison: Comparison) -> None:
    frame = comparison.to_pandas()
    chosen = frame[(frame.split == "forget_test") & (frame.kind == "reply") & (frame.measure == "harmful")]
    change = comparison.replies["forget_test"]["harmful"]
    (row,) = chosen[["base", "unlearned", "change", "low", "high", "n"]].itertuples(index=False, name=None)
    assert row == (change.before.value, change.after.value, change.difference, change.low, change.high, 50)
    assert len(str(comparison).splitlines()) == len(frame) + 1 == comparison._repr_html_().count("<tr")
