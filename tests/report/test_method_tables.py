"""The tables of a comparison."""

from __future__ import annotations

import dataclasses

import pytest

from sku.evaluate.judges import Calibration
from sku.report.method_records import MethodRecord
from sku.report.method_tables import (
    ComparisonRow,
    comparison_rows,
    legend_line,
    markdown_comparison,
    markdown_differences,
    row_order,
)

from .invented_records import JUDGE, failed_record, make_point, make_record

LOSSES = {"retain_test": (10, 10), "forget_test": (20, 20)}


def one_row(records: list[MethodRecord], name: str) -> ComparisonRow:
    return next(row for row in comparison_rows(records) if row.name == name)


def base(replies: str = "hhhh") -> MethodRecord:
    point = make_point(replies, prefill=replies, normal="aaaa", exact="1111", losses=LOSSES)
    return make_record("base", point, control=True)


def test_columns_hold_what_they_say() -> None:
    point = make_point(
        "hhed", judged="1101", prefill="hhhr", normal="aood", exact="100-",
        losses={"retain_test": (12, 12), "forget_test": (30, 30), "normal:benign": (11, 11)}, strength=1.5,
    )  # fmt: skip
    own_base = make_record("base", make_point("hhhh", losses={**LOSSES, "normal:benign": (10, 10)}), control=True)
    row = one_row([own_base, make_record("sku", point)], "sku")
    shares = {
        "harmful_unseen": 0.5, "harmful_ungated_unseen": 0.75, "prefill_unseen": 0.75, "gibberish_unseen": 0.25,
        "gibberish_normal": 0.25, "over_refusal": 0.5, "exact_answers": 1 / 3, "perplexity_normal": 2.718281828 ** 0.2,
        "perplexity_others": 2.718281828 ** 0.1, "perplexity_harmful_unseen": 2.718281828,
    }  # fmt: skip
    for name, value in shares.items():
        assert row.estimates[name].value == pytest.approx(value), name
    assert (row.strength, row.seeds, row.title, row.control) == (1.5, "1/1", "sku", False)
    assert "| \u00d71.221 (1.221 to 1.221) |" in markdown_comparison([row], "legend")


def test_a_row_of_which_every_seed_failed_still_stands() -> None:
    failures = [failed_record("npo", seed, "the loss | is NaN") for seed in range(3)]
    records = [make_record("sku", make_point("hr", losses=LOSSES)), base("hh"), *failures]
    text = markdown_comparison(comparison_rows(records), "")
    line = next(line for line in text.splitlines() if line.startswith("| npo"))
    assert line.endswith("0/3 failed: the loss \\| is NaN |")
    assert row_order(records) == ["sku", "npo", "base"], "controls last"
    assert "| npo | \u2013 | \u2013 |" in markdown_differences(records)


def test_rows_at_equal_utility_say_what_their_strength_costs_and_what_binds_it() -> None:
    """Of two seeds and two prompts that are shown one reply is harmful."""
    points = make_point("hr", strength=0.4, cost=1.0), make_point("rr", strength=0.6, cost=0.8), None
    bounds = "KL on retain_validation", "over-refusal", "KL on retain_validation"
    seeds = [
        make_record("sku", point, seed=seed, bound_by=bound)
        for seed, (point, bound) in enumerate(zip(points, bounds, strict=True))
    ]
    sku, npo = (one_row([*seeds, make_record("npo"), base("hh")], name) for name in ("sku", "npo"))
    assert (sku.strength, sku.utility_cost) == pytest.approx((0.5, 0.9))
    assert sku.estimates["harmful_unseen"].value == 0.25
    assert sku.seeds == "2/3 no strength within the utility budget"
    assert sku.bound_by == "KL on retain_validation (2); over-refusal (1)"
    assert (npo.estimates, npo.strength, npo.seeds[:3]) == ({}, None, "0/1")
    assert npo.bound_by == "nothing, up to the largest strength"


def test_rows_are_of_the_prompts_that_every_row_has_a_verdict_for() -> None:
    """Gibberish without a verdict counts as none: a row that babbles gets no more prompts than the others.

    Of the 5 prompts the judge gave npo no verdict on two, of which one reply is gibberish, and sku none on the last.
    """
    sku = make_record("sku", make_point("hrrhu", judged="1001-"))
    npo = make_record("npo", make_point("hrudr", judged="10--0"))
    rows = {row.name: row for row in comparison_rows([sku, npo])}
    for row in rows.values():
        assert [row.estimates[name].value for name in ("harmful_unseen", "harmful_ungated_unseen")] == [0.5, 0.5]
    assert rows["sku"].bounds == {"harmful_ungated_unseen": (0.4, 0.6), "harmful_unseen": (0.4, 0.6)}
    assert rows["npo"].bounds == {"harmful_ungated_unseen": (0.2, 0.6), "harmful_unseen": (0.2, 0.4)}
    assert "50.0 % (0.0 to 100.0) [20.0 to 60.0]" in markdown_comparison(list(rows.values()), "")


def test_differences() -> None:
    """3 of 4 replies and 4 of 4 prefills differ, all one way: p = 2/8 and 2/16.

    Holm takes the smaller one twice, 2 * 2/16 = 0.25, and the larger one once.
    """
    sku = make_record("sku", make_point("rrrr", prefill="rrrr"))
    npo = make_record("npo", make_point("hhhr", prefill="hhhh"), title="NPO")
    lines = markdown_differences([npo, sku]).splitlines()
    name, replies, first_p, prefilled, second_p = lines[2].strip("| ").split(" | ")
    assert name == "NPO"
    assert replies == "+75.0 (+25.0 to +100.0)"
    assert prefilled.startswith("+100.0 (")
    assert (first_p, second_p) == ("0.250", "0.250")


def test_a_judge_that_can_not_tell_the_base_from_harmless_says_so() -> None:
    """45 of 50 replies of the base are called harmful: with a floor of 92 % that is what no harm gives."""
    for safe_found, told in ((8, True), (95, False)):
        errors = Calibration(data="d", data_sha256="0", harmful=100, harmful_found=99, safe=100, safe_found=safe_found)
        judge = dataclasses.replace(JUDGE, calibration=errors)
        records = [make_record(name, make_point("h" * 45 + "r" * 5), judge=judge) for name in ("base", "sku")]
        assert ("this judge can't measure it" in legend_line(records)) == told
