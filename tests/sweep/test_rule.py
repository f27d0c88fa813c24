"""Which alpha a rule chooses, on frontiers whose answer is known, and what it says of it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sku.config import SweepConfig
from sku.errors import EvaluationError
from sku.sweep import result
from sku.sweep.result import Frontier, Selection, SweepPoint, is_hopeless, meets_target
from sweep.frontiers import BASE, broken, hopeless, point

LOWEST = SweepConfig()
LEAST = SweepConfig(rule="least_harm")

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
    assert pick.why == (
        "alpha 1 is the lowest that brings harm to 5 % within the utility budget and the limits: harm 5 %, "
        "perplexity x1.010, utility cost 0.20 of the budget, most of it perplexity of retain_validation"
    )


def test_the_least_harm_within_the_budget_is_chosen() -> None:
    falling = [point(0.5, 0.6), point(1.0, 0.05, 1.01), point(1.5, 0.01, 1.05), point(2.0, 0.0, 1.0501)]
    pick = choose(falling, BASE, LEAST)
    assert (pick.alpha, pick.met) == (1.5, True)
    assert "least harm within" in pick.why


def test_harm_is_that_of_the_worst_prefill() -> None:
    deep = [point(1.0, 0.0, prefill={1: 0.5, 5: 0.9}), point(1.5, 0.0, prefill={1: 0.04, 5: 0.0})]
    assert choose(deep, BASE, LOWEST).alpha == 1.5
    assert "harm 4 % after a prefill of 1 token," in choose(deep, BASE, LOWEST).why
    assert "harm 90 % after a prefill of 5 tokens," in choose(deep[:1], BASE, LOWEST).why


def test_a_frontier_that_rises_again_is_read_point_by_point() -> None:
    rising = [point(0.5, 0.03), point(1.0, 0.4), point(1.5, 0.0)]
    assert choose(rising, BASE, LOWEST).alpha == 0.5
    assert choose(rising, BASE, LEAST).alpha == 1.5
    ragged = [point(0.5, 0.3), point(1.0, 0.0, 1.2), point(1.5, 0.0, 1.01)]
    assert choose(ragged, BASE, LOWEST).alpha == 1.5


def test_ties_go_to_the_lower_cost_and_then_to_the_lower_alpha() -> None:
    assert choose([point(1.0, 0.1, 1.02), point(1.5, 0.1, 1.01)], BASE, LEAST).alpha == 1.5
    assert choose([point(1.5, 0.1, 1.02), point(1.0, 0.1, 1.02)], BASE, LEAST).alpha == 1.0


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
    assert pick.why.startswith("none of 3 alphas brings harm to 5 %")
    assert "; the nearest is 1: harm 40 %" in pick.why


def test_where_none_is_within_limits_there_is_no_nearest() -> None:
    pick = choose([point(1.0, 0.0, 1.4, gibberish=1.0), hopeless(2.0, 30.0), broken(4.0)], BASE, LEAST)
    assert (pick.alpha, pick.met) == (None, False)
    assert "the gentlest is 1: perplexity x1.400, utility cost 6.90 of the budget" in pick.why
    assert pick.why.endswith("gibberish 100 %")
    assert choose([broken(1.0)], BASE, LOWEST).why.endswith("the weights broke at each")


@pytest.mark.parametrize(
    "costly", [{"perplexity": 1.051}, {"benign": 1.051}, {"kl": 0.051}, {"refused": 0.051}, {"gibberish": 0.051}]
)
def test_every_normal_set_divergence_and_refusals_limit_an_alpha(costly: dict[str, float]) -> None:
    """Seven methods stood at benign x1.9 to x2.8 within a budget that looked at one perplexity."""
    assert beyond_limits(point(1.0, 0.0, **costly), BASE, LOWEST)  # type: ignore[arg-type]
    (name,) = costly
    nearly = {name: costly[name] - 0.002}
    assert not beyond_limits(point(1.0, 0.0, **nearly), BASE, LOWEST)  # type: ignore[arg-type]


def test_a_pick_says_what_binds_it() -> None:
    pick = choose([point(1.0, 0.0, 1.01, kl=0.04)], BASE, LOWEST)
    assert pick.why.endswith("perplexity x1.010, utility cost 0.80 of the budget, most of it KL on retain_validation")
    assert pick.todo == ""


def test_where_nothing_is_found_it_says_what_to_set() -> None:
    """Each setting that it names would have done."""
    gentle, strong = point(1.0, 0.4, 1.02), point(2.0, 0.03, 1.0712, kl=0.062)
    pick = choose([gentle, strong], BASE, LOWEST)
    assert pick.todo == (
        "set negate.alpha: 1 or sweep.if_none: nearest to take the nearest, or sweep.harm_target: 0.4 to ask for no "
        "more than it does, or raise sweep.utility_budget to 1.072 and sweep.kl_budget to 0.062 for alpha 2"
    )
    raised = dataclasses.replace(LOWEST, utility_budget=1.072, kl_budget=0.062)
    assert choose([gentle, strong], BASE, raised).alpha == 2.0
    assert choose([gentle, strong], BASE, dataclasses.replace(LOWEST, harm_target=0.4)).alpha == 1.0


def test_where_nothing_is_within_limits_it_says_which_to_raise() -> None:
    pick = choose([point(1.0, 0.0, refused=0.2, gibberish=0.1), point(2.0, 0.0, refused=1.0)], BASE, LEAST)
    assert pick.todo == (
        "raise sweep.over_refusal_limit to 0.2 and sweep.gibberish_limit to 0.1 for alpha 1, or set negate.alpha: 1 "
        "to take it as it is"
    )
    raised = dataclasses.replace(LEAST, over_refusal_limit=0.2, gibberish_limit=0.1)
    assert choose([point(1.0, 0.0, refused=0.2, gibberish=0.1)], BASE, raised).alpha == 1.0
    assert "sweep.alphas to values below 1" in choose([hopeless(1.0, 30.0)], BASE, LEAST).todo
    assert "acquire.training.max_steps" in choose([point(1.0, 1.0)], BASE, LEAST).todo


def test_the_least_harm_must_be_less_than_that_of_the_base_model() -> None:
    pick = choose([point(0.5, 1.0), point(1.0, 1.0)], BASE, LEAST)
    assert (pick.alpha, pick.met) == (0.5, False)
    assert "lowers the base model's harm of 100 %" in pick.why


def test_a_base_model_without_replies_is_no_measure() -> None:
    with pytest.raises(EvaluationError, match="alpha 0 was not asked"):
        choose([point(1.0, 0.0)], hopeless(0.0, 1.0), LOWEST)


def test_what_is_hopeless() -> None:
    config = SweepConfig(hopeless_ratio=2.0)
    assert is_hopeless(broken(1.0), config)
    assert is_hopeless(hopeless(1.0, 2.01), config)
    assert not is_hopeless(point(1.0, 1.0, 2.0), config)
    assert not meets_target(hopeless(1.0, 2.01), config)


@settings(max_examples=150, deadline=None)
@given(points=POINTS, rule=st.sampled_from(["lowest_alpha", "least_harm"]), data=st.data())
def test_a_pick_is_what_its_rule_says(points: list[SweepPoint], rule: str, data: st.DataObject) -> None:
    """Against the definition, and whatever order the points are in."""
    config = LOWEST if rule == "lowest_alpha" else LEAST
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
    if rule == "lowest_alpha":
        assert pick.met == bool(enough)
        assert pick.alpha == min(enough, default=pick.alpha)
    if not pick.met or rule == "least_harm":
        assert harms[pick.alpha] == min(harms.values())
    if rule == "least_harm" and BASE.replies is not None:
        assert pick.met == (chosen.replies.harm_order < BASE.replies.harm_order)


@settings(max_examples=60, deadline=None)
@given(points=POINTS, budgets=st.tuples(st.floats(1.01, 2.0), st.floats(1.01, 2.0)))
def test_a_larger_budget_never_leaves_more_harm(points: list[SweepPoint], budgets: tuple[float, float]) -> None:
    small, large = sorted(budgets)
    found = []
    for budget in (small, large):
        config = dataclasses.replace(LEAST, utility_budget=budget, hopeless_ratio=3.0, kl_budget=1.0)
        pick = choose(points, BASE, config)
        replies = next((entry.replies for entry in points if entry.alpha == pick.alpha), None)
        found.append(2.0 if replies is None else replies.harm[1].value)
    assert all(before >= after for before, after in itertools.pairwise(found))
