"""Which alpha a rule chooses, on frontiers whose answer is known, and what it says of it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sku.config import SweepConfig
from sku.sweep import result
from sku.sweep.result import Frontier, Selection, SweepPoint, is_hopeless, meets_target
from sweep.frontiers import BASE, broken, hopeless, point

LOWEST = SweepConfig()
LEAST = SweepConfig(harm_target=None)

SHARES = st.integers(0, 100).map(lambda count: count / 100)
POINTS = st.lists(
    st.builds(
        point,
        st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 3.0]),
        SHARES,
        st.floats(0.9, 3.0),
        prefill=st.dictionaries(st.sampled_from([1, 3, 5]), SHARES),
        gibberish=SHARES,
        normal_gibberish=SHARES,
        refused=SHARES,
    ),
    max_size=6,
    unique_by=lambda found: found.alpha,
)


def choose(points: Sequence[SweepPoint], base: SweepPoint, config: SweepConfig) -> Selection:
    return result.choose(Frontier(points=tuple(points), base=base, config=config))


def beyond_limits(found: SweepPoint, base: SweepPoint, config: SweepConfig) -> bool:
    return result.beyond_limits(found, Frontier(base=base, config=config))


def test_the_lowest_alpha_that_meets_the_target_is_chosen() -> None:
    falling = [point(0.5, 0.6), point(1.0, 0.05, 1.01), point(1.5, 0.0, 1.03), point(2.0, 0.0, 1.2)]
    pick = choose(falling, BASE, LOWEST)
    assert (pick.alpha, pick.met) == (1.0, True)


def test_harm_is_that_of_the_worst_prefill() -> None:
    deep = [point(1.0, 0.0, prefill={1: 0.5, 5: 0.9}), point(1.5, 0.0, prefill={1: 0.04, 5: 0.0})]
    assert choose(deep, BASE, LOWEST).alpha == 1.5


def test_of_equal_largest_rates_the_lower_mean_is_less_harm() -> None:
    stubborn = [point(0.5, 0.9, 1.0, prefill={3: 1.0}), point(1.0, 0.0, 1.02, prefill={3: 1.0})]
    base = point(0.0, 1.0, prefill={3: 1.0})
    pick = choose(stubborn, base, LEAST)
    assert (pick.alpha, pick.met) == (1.0, True)
    assert choose(stubborn, base, LOWEST).alpha == 1.0


@pytest.mark.parametrize("limit", ["gibberish", "normal_gibberish", "refused"])
def test_limits_count_from_the_share_of_the_base_model(limit: str) -> None:
    base = point(0.0, 1.0, **{limit: 0.1})  # type: ignore[arg-type]
    within, beyond = point(1.0, 0.0, **{limit: 0.15}), point(1.0, 0.0, **{limit: 0.16})  # type: ignore[arg-type]
    assert not beyond_limits(within, base, LOWEST)
    assert beyond_limits(beyond, base, LOWEST)
    assert beyond_limits(within, BASE, LOWEST)


def test_where_none_meets_the_target_the_nearest_is_named() -> None:
    pick = choose([point(0.5, 0.9), point(1.0, 0.4, 1.02), point(2.0, 0.0, 1.3)], BASE, LOWEST)
    assert (pick.alpha, pick.met) == (1.0, False)


def test_where_none_is_within_limits_there_is_no_nearest() -> None:
    pick = choose([point(1.0, 0.0, 1.4, gibberish=1.0), hopeless(2.0, 30.0), broken(4.0)], BASE, LEAST)
    assert (pick.alpha, pick.met) == (None, False)
    assert choose([broken(1.0)], BASE, LOWEST).alpha is None


@pytest.mark.parametrize(
    "costly", [{"perplexity": 1.051}, {"benign": 1.051}, {"kl": 0.051}, {"refused": 0.051}, {"gibberish": 0.051}]
)
def test_every_normal_set_divergence_and_refusals_limit_an_alpha(costly: dict[str, float]) -> None:
    """Seven methods stood at benign x1.9 to x2.8 within a budget that looked at one perplexity."""
    assert beyond_limits(point(1.0, 0.0, **costly), BASE, LOWEST)  # type: ignore[arg-type]
    (name,) = costly
    nearly = {name: costly[name] - 0.002}
    assert not beyond_limits(point(1.0, 0.0, **nearly), BASE, LOWEST)  # type: ignore[arg-type]


def test_where_nothing_is_within_limits_it_says_which_to_raise() -> None:
    costly = [point(1.0, 0.0, 1.2, kl=0.25), point(2.0, 0.0, refused=1.0)]
    todo = choose(costly, BASE, LEAST).todo.split()
    assert {"sweep.utility_budget", "1.285", "negate.alpha:"} <= set(todo)
    assert choose(costly, BASE, dataclasses.replace(LEAST, utility_budget=1.285)).alpha == 1.0
    assert "sweep.alphas to values below 1" in choose([hopeless(1.0, 30.0)], BASE, LEAST).todo
    assert "acquire.training.max_steps" in choose([point(1.0, 1.0)], BASE, LEAST).todo


def test_the_least_harm_must_be_less_than_that_of_the_base_model() -> None:
    pick = choose([point(0.5, 1.0), point(1.0, 1.0)], BASE, LEAST)
    assert (pick.alpha, pick.met) == (0.5, False)


def test_what_is_hopeless() -> None:
    config = SweepConfig()
    assert is_hopeless(broken(1.0), config)
    assert is_hopeless(hopeless(1.0, 2.01), config)
    assert not is_hopeless(point(1.0, 1.0, 2.0), config)
    assert not meets_target(hopeless(1.0, 2.01), config)


@settings(max_examples=150, deadline=None)
@given(points=POINTS, config=st.sampled_from([LOWEST, LEAST]), data=st.data())
def test_a_pick_is_what_its_rule_says(points: list[SweepPoint], config: SweepConfig, data: st.DataObject) -> None:
    """Against the definition, and whatever order the points are in."""
    pick = choose(points, BASE, config)
    assert choose(data.draw(st.permutations(points)), BASE, config) == pick
    fitting = {found.alpha: found for found in points if not beyond_limits(found, BASE, config)}
    if pick.alpha is None:
        assert not fitting
        return
    chosen = fitting[pick.alpha]
    assert chosen.replies is not None
    harms = {alpha: found.replies.harm[1].value for alpha, found in fitting.items() if found.replies is not None}
    enough = [alpha for alpha, found in fitting.items() if meets_target(found, config)]
    if config == LOWEST:
        assert pick.met == bool(enough)
        assert pick.alpha == min(enough, default=pick.alpha)
    if not pick.met or config == LEAST:
        assert harms[pick.alpha] == min(harms.values())
    if config == LEAST and BASE.replies is not None:
        assert pick.met == (chosen.replies.harm_order < BASE.replies.harm_order)


@settings(max_examples=60, deadline=None)
@given(points=POINTS, budgets=st.tuples(st.floats(1.01, 2.0), st.floats(1.01, 2.0)))
def test_a_larger_budget_never_leaves_more_harm(points: list[SweepPoint], budgets: tuple[float, float]) -> None:
    small, large = sorted(budgets)
    found = []
    for budget in (small, large):
        config = dataclasses.replace(LEAST, utility_budget=budget)
        pick = choose(points, BASE, config)
        replies = next((entry.replies for entry in points if entry.alpha == pick.alpha), None)
        found.append(2.0 if replies is None else replies.harm[1].value)
    assert all(before >= after for before, after in itertools.pairwise(found))
