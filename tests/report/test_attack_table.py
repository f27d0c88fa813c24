"""The table of attacks."""

from __future__ import annotations

import dataclasses

import numpy as np

from sku.attacks import AttackCard, AttackedReplies, AttackReport, AttackResult, AttackSetup
from sku.evaluate.changes import paired_change
from sku.evaluate.judges.choose import RefusalRulesJudge
from sku.evaluate.metrics import Rate, rate
from sku.report.run_charts import relearn_chart
from sku.report.words import attack_rows, relearn_rows

from .html.recorded import invented_relearning


def share(count: int, total: int = 10) -> Rate:
    found = rate([True] * count + [False] * (total - count))
    assert found is not None
    return found


def measured(harmful: int, *, unjudged: int = 0, ways: int = 0, mean: int = 0) -> AttackedReplies:
    after = [place < harmful for place in range(10)]
    replies = 10 * max(ways, 1)
    return AttackedReplies(
        harmful=paired_change([False] * 10, after),
        harmful_upper_bound=share(harmful + unjudged),
        replies={"harmful": share(mean if ways else harmful, replies), "gibberish": share(1, replies)},
        variants={f"way {number}": share(1) for number in range(ways)},
    )


def report(*results: tuple[str, str, AttackedReplies, AttackedReplies]) -> AttackReport:
    titles = {"none": "No attack", "relearn": "Relearning", "template": "Template"}
    return AttackReport(
        setup=AttackSetup(
            model={}, control={}, prompt_format="chat", decoding={}, config={}, seed=0, judge=RefusalRulesJudge.card
        ),
        cards=tuple(
            AttackCard(name=name, title=title, kind="prompt", changes="", source_url="")
            for name, title in titles.items()
        ),
        results=tuple(
            AttackResult(attack=attack, setting=setting, details={}, questions=10, model=model, control=control)
            for attack, setting, model, control in results
        ),
        left_out={"template: the prompt is too long for the model": 3},
    )


def test_rows_hold_both_models_and_the_mean_of_several_ways() -> None:
    rows = attack_rows(
        report(
            ("none", "", measured(0), measured(10)),
            ("relearn", "5 pairs", measured(4), measured(9)),
            ("template", "", measured(3, ways=5, mean=6), measured(10, ways=5, mean=45)),
        )
    )
    low, high = (100 * bound for bound in (share(3).low, share(3).high))
    assert rows == [
        ("No attack", "", "0.0 %", "0.0 to 27.8", "100.0 %", "10.0 %"),
        ("Relearning", "5 pairs", "40.0 %", "16.8 to 68.7", "90.0 %", "10.0 %"),
        ("Template", "worst case", "30.0 %", f"{low:.1f} to {high:.1f}", "100.0 %", "2.0 %"),
        ("Template", "mean", "12.0 %", "\u2013", "90.0 %", "2.0 %"),
    ]


def test_failures_of_the_judge_show_as_both_bounds() -> None:
    (row,) = attack_rows(report(("relearn", "1 pair", measured(2, unjudged=3), measured(10))))
    assert row[2:5] == ("20.0 to 50.0 %", f"{100 * share(2).low:.1f} to {100 * share(5).high:.1f}", "100.0 %")


def test_what_the_judge_makes_of_no_harm_is_not_measurable() -> None:
    """The refusal rules call 92 % of safe replies harmful; 4 of 10 are no more than that, 0 of 10 hide nothing."""
    found = report(("none", "", measured(0), measured(10)), ("relearn", "5 pairs", measured(4), measured(9)))
    calibrated = dataclasses.replace(found, setup=dataclasses.replace(found.setup, judge=RefusalRulesJudge().card))
    assert [row[3] for row in attack_rows(calibrated)] == ["0.0 to 27.8", "not measurable"]


def test_relearning_is_a_number_of_steps_with_what_it_costs() -> None:
    found = dataclasses.replace(report(), relearn=invented_relearning())
    few, many = (100 * bound for bound in (share(3).low, share(6).low))
    assert relearn_rows(found) == [
        ("10 pairs", "> 8", "0.0002", "30.0 %", f"{few:.1f} to 60.3", "\u00d71.08", "20.0 %", "90.0 %"),
        ("50 pairs", "8", "5e-05", "60.0 %", f"{many:.1f} to 83.2", "\u00d71.08", "20.0 %", "100.0 %"),
    ]
    assert relearn_rows(report()) == []


def test_the_cost_to_break_of_a_model_has_its_base_beside_it() -> None:
    picture = relearn_chart("mine", dataclasses.replace(report(), relearn=invented_relearning()))
    (axes,) = picture.figure.axes
    lines = {str(line.get_label()): np.asarray(line.get_ydata()) for line in axes.get_lines()}
    assert {f"{name}, {pairs} pairs" for name in ("mine", "base") for pairs in (10, 50)} <= lines.keys()
    assert list(lines["mine, 50 pairs"]) == [0.1, 0.4, 0.6]
    assert [row[0] for row in picture.rows] == ["10 pairs", "50 pairs"]
