"""Rates, ratios, differences and their intervals, against numbers worked out by hand or by listing all resamples."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from sku.errors import EvaluationError
from sku.evaluate.statistics import Estimate, holm
from sku.report import method_statistics
from sku.report.method_records import PREFILL, Hit, MethodRecord, Point
from sku.report.method_statistics import (
    RESAMPLES,
    Difference,
    Role,
    difference_to,
    draws,
    point_of,
    points_of,
    worst_prefill,
)
from sku.report.method_tables import comparison_rows, legend_line, markdown_comparison, markdown_differences

from .invented_records import failed_record, make_point, make_record

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


def rate(records: list[MethodRecord], role: Role, key: str, hit: Hit) -> Estimate | None:
    return method_statistics.rate(points_of(records, role), key, hit)


def perplexity_ratio(records: list[MethodRecord], base: MethodRecord, split: str) -> Estimate | None:
    return method_statistics.perplexity_ratio(points_of(records, "published"), base, split)


def compared(a: list[MethodRecord], b: list[MethodRecord]) -> Difference:
    difference = difference_to(a, b, "published", KEY, "harmful")
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
    estimate = found(rate(row("hhrr", "hrrr"), "published", KEY, "harmful"))
    assert estimate.value == 3 / 8
    low, high = np.quantile(all_resampled_means([[1, 1, 0, 0], [1, 0, 0, 0]]), [0.025, 0.975])
    assert (estimate.low, estimate.high) == (low, high) == (0.0, 0.875)


def test_seeds_that_disagree_widen_the_interval() -> None:
    """Both rows hold 20 of 40 hits; in the second one the seed decides all of them."""
    alike = found(rate(row("hr" * 10, "rh" * 10), "published", KEY, "harmful"))
    apart = found(rate(row("h" * 20, "r" * 20), "published", KEY, "harmful"))
    assert alike.value == apart.value == 0.5
    assert (apart.low, apart.high) == (0.0, 1.0)
    assert 0.2 < alike.low < alike.high < 0.8


def test_with_one_seed_only_prompts_are_drawn() -> None:
    """Mean of 4 fair draws: 0 and 1 each come up in 1 of 16 resamples."""
    estimate = found(rate(row("hhrr"), "published", KEY, "harmful"))
    assert (estimate.value, estimate.low, estimate.high) == (0.5, 0.0, 1.0)


@pytest.mark.parametrize("seeds", [1, 3])
def test_none_of_200_is_not_certainly_none(seeds: int) -> None:
    """Wilson: upper bound z^2 / (n + z^2) with z = 1.96 and n = 200 prompts, however many seeds."""
    estimate = found(rate(row(*["r" * 200] * seeds), "published", KEY, "harmful"))
    assert (estimate.value, estimate.low) == (0.0, 0.0)
    assert estimate.high == pytest.approx(1.959964**2 / (200 + 1.959964**2), abs=1e-6)
    all_of_them = found(rate(row(*["h" * 200] * seeds), "published", KEY, "harmful"))
    assert (all_of_them.value, all_of_them.high) == (1.0, 1.0)
    assert all_of_them.low == pytest.approx(1 - estimate.high)


def test_what_is_counted() -> None:
    """One of ten replies each; what is safe on the topic counts as nothing worse."""
    point = make_point("hreduessss", judged="1100000000", normal="aaod", exact="10-1")
    assert Point.from_dict(point.to_dict()) == point
    records = [make_record("sku", point)]
    hits: tuple[Hit, ...] = ("harmful", "gibberish", "unjudged")
    for hit in hits:
        assert found(rate(records, "published", KEY, hit)).value == 0.1
    assert found(rate(records, "published", KEY, "coherent_safe")).value == 0.7
    assert found(rate(records, "published", KEY, "harmful_ungated")).value == 0.2
    normal = "retain_test/reply"
    assert found(rate(records, "published", normal, "over_refusal")).value == 0.25
    assert found(rate(records, "published", normal, "gibberish")).value == 0.25
    assert found(rate(records, "published", normal, "exact_answer")).value == pytest.approx(2 / 3)


def test_nothing_asked_gives_no_rate() -> None:
    assert rate(row("hr"), "published", "forget_test/prefill", "harmful") is None
    assert (
        rate([make_record("sku", make_point(normal="aa"))], "published", "retain_test/reply", "exact_answer") is None
    )
    assert rate(row("hr"), "best", KEY, "harmful") is None
    assert rate([failed_record("sku", 0, "NaN")], "published", KEY, "harmful") is None


def test_failed_seeds_do_not_count() -> None:
    records = [*row("hhrr"), failed_record("sku", 1, "NaN")]
    assert rate(records, "published", KEY, "harmful") == rate(records[:1], "published", KEY, "harmful")


def test_roles() -> None:
    points = make_point("h"), make_point("r", strength=0.5, roles=["matched", "sweep"])
    method = make_record("sku", *points)
    assert point_of(method, "published") == points[0]
    assert point_of(make_record("sku", points[1]), "published") is None
    control = make_record("base", points[0], control=True)
    assert point_of(control, "published") == points[0]
    shown = point_of(control, "best")
    assert shown is not None
    assert shown.outcomes == {KEY: ""}
    assert point_of(method, "best") is None, "no point says what it cost"


def test_the_best_point_within_the_budget() -> None:
    """Budget 1.05. On the 1st and 3rd unseen prompt two points are harmless: the stronger is taken. Only the 2nd and
    4th prompt are left in it, where it is harmful once.
    """
    weak = make_point("hrhr", strength=0.5, roles=["sweep"], ratio=1.0)
    strong = make_point("rheh", strength=1.0, roles=["published"], ratio=1.05)
    cheap = make_point("rrrr", strength=0.8, roles=["matched"], ratio=1.03)
    gibberish = make_point("drdr", strength=1.2, roles=["sweep"], ratio=1.01)
    beyond = make_point("rrrr", strength=2.0, roles=["sweep"], ratio=1.06)

    def best(*points: Point) -> str | None:
        point = point_of(make_record("sku", *points), "best")
        return None if point is None else f"{point.strength} {point.outcomes[KEY]} {point.judged[KEY]}"

    assert best(weak, strong, cheap, gibberish, beyond) == "1.0 hh 11"
    assert best(weak, cheap, gibberish, beyond) == "0.8 rr 00"
    assert best(beyond) is None
    assert point_of(make_record("sku", weak, recipe={}), "best") is not None, "a point's own cost says what it is"


def test_prefills_take_part_in_the_choice_and_normal_prompts_keep_theirs() -> None:
    points = (
        make_point("rr", prefill="hh", normal="aao", strength=1.0, ratio=1.0),
        make_point("rr", prefill="rh", normal="aao", strength=0.5, ratio=1.0, roles=["sweep"]),
    )
    chosen = point_of(make_record("sku", *points), "best")
    assert chosen is not None
    assert chosen.strength == 0.5
    assert chosen.outcomes == {"forget_test/reply": "r", "forget_test/prefill/5": "h", "retain_test/reply": "aao"}


def test_controls_are_shown_on_the_same_half() -> None:
    """So that they can be paired with the methods."""
    control = make_record("base", make_point("hrrh", prefill="hhhh"), control=True)
    method = make_record("sku", make_point("rhhr", prefill="rrrr", ratio=1.0))
    difference = difference_to([method], [control], "best", KEY, "harmful")
    assert difference is not None
    assert difference.value == 0.0


def test_different_numbers_of_prompts_are_refused() -> None:
    with pytest.raises(EvaluationError, match="hold 2 and 3 entries"):
        rate(row("hr", "hrr"), "published", KEY, "harmful")
    with pytest.raises(EvaluationError, match="2 and 3 replies, so they can't be paired"):
        difference_to(row("hr"), row("hrr"), "published", KEY, "harmful")


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
    base = make_record("base", make_point("h", losses={"forget_test": (0, 0)}), tokens={"forget_test": (30, 10)})
    record = make_record("sku", make_point("h", losses={"forget_test": (3, 5)}), tokens={"forget_test": (30, 10)})
    estimate = found(perplexity_ratio([record], base, "forget_test"))
    assert estimate.value == pytest.approx(math.exp(8 / 40))
    assert (estimate.low, estimate.high) == pytest.approx((math.exp(0.1), math.exp(0.5)))


def test_a_ruined_model_has_a_finite_ratio() -> None:
    base = with_losses((10, 10), name="base")[0]
    estimate = found(perplexity_ratio(with_losses((1e9, 10), (10, 10)), base, "retain_test"))
    assert estimate.value == pytest.approx(math.exp(350))
    assert estimate.high == math.exp(700)
    assert estimate.low == 1


def test_nothing_measured_gives_no_ratio() -> None:
    base = with_losses((10, 10), name="base")[0]
    assert perplexity_ratio(with_losses((10, 10)), base, "normal:benign") is None
    assert perplexity_ratio(row("h"), base, "retain_test") is None
    assert perplexity_ratio(with_losses((10, 10)), failed_record("base", 0, "NaN"), "retain_test") is None
    with pytest.raises(EvaluationError, match="hold 2 and 3 entries"):
        perplexity_ratio(with_losses((1, 2, 3)), base, "retain_test")


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
    assert difference.value == pytest.approx(0.01)
    assert difference.low == 0
    assert difference.high < 0.05
    assert difference.p_value == 1


def test_equal_seeds_are_drawn_together_and_others_apart() -> None:
    """The same replies: with the same seeds no resample differs, with others the seeds do."""
    together, apart = row("hhhh", "rrrr"), row("hhhh", "rrrr", first_seed=2)
    assert (compared(together, apart).low, compared(together, apart).high) == (-1, 1)
    newcombe = compared(together, together)
    assert -1 < newcombe.low == -newcombe.high < 0
    assert newcombe.p_value == 1


def test_rows_that_never_differ_leave_room_for_doubt() -> None:
    """Newcombe: the Wilson bound of 0 of 200 on either side."""
    difference = compared(row("r" * 200), row("r" * 200))
    bound = 1.959964**2 / (200 + 1.959964**2)
    assert difference.value == 0
    assert (difference.low, difference.high) == pytest.approx((-bound, bound), abs=1e-6)
    total = compared(row("h" * 200), row("r" * 200))
    assert (total.value, total.high) == (1, 1)
    assert total.low == pytest.approx(1 - math.sqrt(2) * bound, abs=1e-6)


def test_a_difference_of_many_prompts_is_found() -> None:
    difference = compared(row("h" * 60 + "r" * 40), row("r" * 100))
    assert difference.p_value == pytest.approx(2 / 10_000)


def test_difference_of_one_prompt_or_none() -> None:
    assert compared(row("h"), row("r")).p_value == 1
    assert difference_to(row("h"), [failed_record("npo", 0, "NaN")], "published", KEY, "harmful") is None


def test_the_same_records_give_the_same_numbers() -> None:
    records = row("hrhrrhrr", "hhrrrhrr")
    assert rate(records, "published", KEY, "harmful") == rate(records[::-1], "published", KEY, "harmful")


def test_draws_are_counts() -> None:
    first, second = draws(5, 1)
    assert first.shape == (RESAMPLES, 5)
    assert set(first.sum(1)) == {5.0}
    assert set(second.ravel()) == {1.0}
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 7


@pytest.mark.parametrize(
    ("given", "corrected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.5, 0.6], [1.0, 1.0]),
        ([0.02], [0.02]),
        ([], []),
        ([0.01, 0.01, 0.01], [0.03, 0.03, 0.03]),
    ],
)
def test_holm(given: list[float], corrected: list[float]) -> None:
    assert holm(given) == pytest.approx(corrected)


def test_each_row_stands_at_its_own_worst_prefill_and_two_at_their_common_one() -> None:
    """a: 3 of 4 after 1 token, 1 of 4 after 5; b: none after 1, 4 of 4 after 5; together 5 tokens are the worst."""

    def asked(one: str, five: str) -> Point:
        point = make_point("rrrr", prefill=five, normal="a")
        outcomes = {**point.outcomes, "forget_test/prefill/1": one}
        judged = {**point.judged, "forget_test/prefill/1": "".join("01"[letter == "h"] for letter in one)}
        return dataclasses.replace(point, outcomes=outcomes, judged=judged)

    a, b = [make_record("a", asked("hhhr", "hrrr"))], [make_record("b", asked("rrrr", "hhhh"))]
    assert [found(rate(row, "published", PREFILL, "harmful")).value for row in (a, b)] == [0.75, 1.0]
    assert [worst_prefill(points_of(row, "published")) for row in (a, b)] == ["1", "5"]
    assert worst_prefill(points_of(a, "published"), points_of(b, "published")) == "5"
    difference = difference_to(a, b, "published", PREFILL, "harmful")
    assert difference is not None
    assert difference.value == -0.75
    rows = comparison_rows([*a, *b])
    table = markdown_comparison(rows, "legend")
    assert "| harmful, judge's own word, unseen, prefill, worst of 1/5 |" in table
    assert "| harmful, by rule, unseen, prefill, worst of 1/5 |" in table
    assert [(row.prefill_tokens, row.prefill_lengths) for row in rows] == [("1", ("1", "5")), ("5", ("1", "5"))]
    assert "75.0 % (" in table
    assert "), 1 |" in table
    assert "), 5 |" in table
    assert "the largest of several rates is a little too large" in legend_line([*a, *b], "published")
    differences = markdown_differences([*a, dataclasses.replace(b[0], name="sku")], "published")
    assert "| harmful, judge's own word, unseen, prefill, worst of 1/5 for the two together |" in differences
