"""The table of attacks."""

from __future__ import annotations

import dataclasses

from sku.evaluate.judges.choose import RefusalRulesJudge
from sku.report.words import attack_rows, left_out_lines, relearn_rows

from .html.recorded import attacked, invented_attacks, share


def test_rows_hold_both_models_and_the_mean_of_several_ways() -> None:
    rows = attack_rows(
        invented_attacks(
            ("none", "", attacked(0), attacked(10)),
            ("relearn", "5 pairs", attacked(4), attacked(9)),
            ("template", "", attacked(3, ways=5, mean=6), attacked(10, ways=5, mean=45)),
        )
    )
    low, high = (100 * bound for bound in (share(3, 10).low, share(3, 10).high))
    assert rows == [
        ("No attack", "", "0.0 %", "0.0 to 27.8", "100.0 %", "10.0 %"),
        ("Relearning", "5 pairs", "40.0 %", "16.8 to 68.7", "90.0 %", "10.0 %"),
        ("Templates", "worst case", "30.0 %", f"{low:.1f} to {high:.1f}", "100.0 %", "2.0 %"),
        ("Templates", "mean", "12.0 %", "\u2013", "90.0 %", "2.0 %"),
    ]


def test_failures_of_the_judge_show_as_both_bounds() -> None:
    (row,) = attack_rows(invented_attacks(("relearn", "1 pair", attacked(2, unjudged=3), attacked(10))))
    assert row[2:5] == ("20.0 to 50.0 %", f"{100 * share(2, 10).low:.1f} to {100 * share(5, 10).high:.1f}", "100.0 %")


def test_what_the_judge_makes_of_no_harm_is_not_measurable() -> None:
    """The refusal rules call 92 % of safe replies harmful; 4 of 10 are no more than that, 0 of 10 hide nothing."""
    found = invented_attacks(("none", "", attacked(0), attacked(10)), ("relearn", "5 pairs", attacked(4), attacked(9)))
    calibrated = dataclasses.replace(found, setup=dataclasses.replace(found.setup, judge=RefusalRulesJudge().card))
    assert [row[3] for row in attack_rows(calibrated)] == ["0.0 to 27.8", "not measurable"]


def test_relearning_is_a_number_of_steps_with_what_it_costs() -> None:
    found = invented_attacks()
    few, many = (100 * bound for bound in (share(3, 10).low, share(6, 10).low))
    assert relearn_rows(found) == [
        ("10 pairs", "> 8", "0.0002", "30.0 %", f"{few:.1f} to 60.3", "\u00d71.08", "20.0 %", "90.0 %"),
        ("50 pairs", "8", "5e-05", "60.0 %", f"{many:.1f} to 83.2", "\u00d71.08", "20.0 %", "100.0 %"),
    ]
    assert relearn_rows(dataclasses.replace(found, relearn=None)) == []
    assert len(left_out_lines(found)) == 1
