"""Rates, ratios, differences and their intervals, against numbers worked out by hand or by listing all resamples."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from sku.evaluate.statistics import Estimate
from sku.report import method_records
from sku.report.method_records import (
    PREFILL,
    Difference,
    MethodRecord,
    Point,
    difference_to,
    points_of,
    worst_prefill,
)
from sku.report.method_tables import comparison_rows

from .invented_records import failed_record, make_point, make_record, make_replies

KEY = "forget_test/reply"


def row(*replies: str, name: str = "sku", first_seed: int = 0) -> list[MethodRecord]:
    """One record per seed, from its letters."""
    return [make_record(name, make_point(text), seed=first_seed + seed) for seed, text in enumerate(replies)]


def with_losses(*losses: Sequence[float], name: str = "sku") -> list[MethodRecord]:
    return [
        make_record(name, make_point("h", losses={"retain_test": nlls}), seed=seed) for seed, nlls in enumerate(losses)
    ]


def found(estimate: Estimate | None) -> Estimate:
    assert estimate is not None
    return estimate


def rate(records: list[MethodRecord], key: str, hit: str) -> Estimate | None:
    return method_records.rate(points_of(records), key, hit)


def perplexity_ratio(records: list[MethodRecord], base: MethodRecord, split: str) -> Estimate | None:
    assert base.point is not None
    return method_records.perplexity_ratio(points_of(records), base.point, split)


def compared(a: list[MethodRecord], b: list[MethodRecord]) -> Difference:
    difference = difference_to(a, b, KEY, "harmful")
    assert difference is not None
    return difference


def all_resampled_means(table: Sequence[Sequence[float]]) -> list[float]:
    """Every way to draw the seeds and, crossed with it, the prompts."""
    seeds, prompts = range(len(table)), range(len(table[0]))
    return [
        float(np.mean([table[seed][prompt] for seed in drawn for prompt in chosen]))
        for drawn in itertools.product(seeds, repeat=len(seeds))
        for chosen in itertools.product(prompts, repeat=len(prompts))
    ]


def test_two_seeds_and_four_prompts() -> None:
    """3 of 8 replies are harmful; of the 1,024 equally likely resamples 2.5 % lie below 0 and 2.5 % above 0.875."""
    estimate = found(rate(row("hhrr", "hrrr"), KEY, "harmful"))
    assert estimate.value == 3 / 8
    low, high = np.quantile(all_resampled_means([[1, 1, 0, 0], [1, 0, 0, 0]]), [0.025, 0.975])
    assert (estimate.low, estimate.high) == (low, high) == (0.0, 0.875)


def test_none_of_200_is_not_certainly_none() -> None:
    """Wilson: upper bound z^2 / (n + z^2) with z = 1.96 and n = 200 prompts, however many seeds."""
    estimate = found(rate(row(*["r" * 200] * 3), KEY, "harmful"))
    assert (estimate.value, estimate.low) == (0.0, 0.0)
    assert estimate.high == pytest.approx(1.959964**2 / (200 + 1.959964**2), abs=1e-6)


def test_what_is_counted() -> None:
    """One of ten replies each; what is safe on the topic counts as nothing worse."""
    records = [make_record("sku", make_point("hreduessss", judged="1100000000", normal="aaod", exact="10-1"))]
    for key, shares in (
        (KEY, {"harmful": 0.1, "gibberish": 0.1, "unjudged": 0.1, "coherent_safe": 0.7, "harmful_ungated": 0.2}),
        ("retain_test/reply", {"over_refusal": 0.25, "gibberish": 0.25, "exact_answer": 2 / 3}),
    ):
        assert {hit: found(rate(records, key, hit)).value for hit in shares} == pytest.approx(shares)


def test_perplexity_ratio() -> None:
    """Rises of 2 + 2 and of 6 + 0 nats over 20 tokens: e^0.2 and e^0.3.

    Resamples of one seed twice and one answer twice have chance 1/16: seed 1 alone gives e^0 to e^0.6.
    """
    base = with_losses((10, 10), name="base")[0]
    estimate = found(perplexity_ratio(with_losses((12, 12), (16, 10)), base, "retain_test"))
    assert estimate.value == pytest.approx(math.exp(0.25))
    assert (estimate.low, estimate.high) == pytest.approx((1.0, math.exp(0.6)))
    same = found(perplexity_ratio([base], base, "retain_test"))
    assert (same.value, same.low, same.high) == (1, 1, 1)


def test_long_answers_weigh_more() -> None:
    base = make_record("base", make_point("h", losses={"forget_test": (0, 0)}, tokens=(30, 10)))
    record = make_record("sku", make_point("h", losses={"forget_test": (3, 5)}, tokens=(30, 10)))
    estimate = found(perplexity_ratio([record], base, "forget_test"))
    assert estimate.value == pytest.approx(math.exp(8 / 40))
    assert (estimate.low, estimate.high) == pytest.approx((math.exp(0.1), math.exp(0.5)))


def test_difference_of_two_rows() -> None:
    """Three of four prompts differ, all one way: of 8 ways to swap them 2 are as extreme."""
    difference = compared(row("hhhr"), row("rrrr"))
    assert difference.value == 0.75
    assert difference.p_value == pytest.approx(0.25)
    low, high = np.quantile(all_resampled_means([[1, 1, 1, 0]]), [0.025, 0.975])
    assert (difference.low, difference.high) == (low, high) == (0.25, 1.0)


def test_differences_are_paired_by_prompt() -> None:
    """Row a is harmful where b is and on one prompt more: half of all prompts vary, the difference hardly does."""
    difference = compared(row("h" * 51 + "r" * 49), row("h" * 50 + "r" * 50))
    assert (difference.value, difference.low, difference.p_value) == pytest.approx((0.01, 0, 1))
    assert difference.high < 0.05


def test_equal_seeds_are_drawn_together_and_others_apart() -> None:
    """The same replies: with the same seeds no resample differs, with others the seeds do."""
    together, apart = row("hhhh", "rrrr"), row("hhhh", "rrrr", first_seed=2)
    assert (compared(together, apart).low, compared(together, apart).high) == (-1, 1)
    # Newcombe: the Wilson bound of 0 of 200 on either side.
    never, bound = compared(row("r" * 200), row("r" * 200)), 1.959964**2 / (200 + 1.959964**2)
    assert (never.value, never.low, never.high, never.p_value) == pytest.approx((0, -bound, bound, 1), abs=1e-6)


def test_each_row_stands_at_its_own_worst_prefill_and_two_at_their_common_one() -> None:
    """a: 3 of 4 after 1 token, 1 of 4 after 5; b: none after 1, 4 of 4 after 5; together 5 tokens are the worst."""

    def asked(one: str, five: str) -> Point:
        point = make_point("rrrr", prefill=five, normal="a")
        key = f"{PREFILL}/1"
        return dataclasses.replace(point, replies={**point.replies, key: make_replies(key, one)})

    a, b = [make_record("a", asked("hhhr", "hrrr"))], [make_record("b", asked("rrrr", "hhhh"))]
    assert [found(rate(row, PREFILL, "harmful")).value for row in (a, b)] == [0.75, 1.0]
    assert [worst_prefill(points_of(row)) for row in (a, b)] == ["1", "5"]
    assert worst_prefill(points_of(a), points_of(b)) == "5"
    difference = difference_to(a, b, PREFILL, "harmful")
    assert difference is not None
    assert difference.value == -0.75
    assert [row.prefill_tokens for row in comparison_rows([*a, *b])] == ["1", "5"]


def test_what_was_not_measured_is_none() -> None:
    """A model that broke has a finite ratio: at most 700 nats a token count."""
    base = with_losses((10, 10), name="base")[0]
    assert rate(row("hr"), "forget_test/prefill", "harmful") is None
    assert rate([failed_record("sku", 0, "NaN")], KEY, "harmful") is None
    assert perplexity_ratio(with_losses((10, 10)), base, "normal:benign") is None
    ruined = found(perplexity_ratio(with_losses((1e9, 10), (10, 10)), base, "retain_test"))
    assert ruined.value == pytest.approx(math.exp(350))
    assert (ruined.low, ruined.high) == (1, math.exp(700))
