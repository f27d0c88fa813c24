"""Which alpha a rule chooses, on frontiers whose answer is known, and what it says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sku import sweep
from sku.config import SweepConfig
from sku.errors import NoAlphaError
from sku.evaluate.judges.choose import EmbeddedWorldJudge
from sku.evaluate.metrics import Rate
from sku.evaluate.statistics import Estimate
from sku.sweep import Replies, Selection, Sweep, SweepPoint


def share(value: float) -> Rate:
    return Rate(count=round(value * 100), total=100, value=value, low=value, high=value)


def same(value: float) -> Estimate:
    return Estimate(value=value, low=value, high=value)


def point(
    alpha: float, harmful: float, perplexity: float = 1.0, *, prefill: dict[int, float] | None = None,
    gibberish: float = 0.0, normal_gibberish: float = 0.0, refused: float = 0.0, kl: float = 0.0,
    benign: float = 1.0,
) -> SweepPoint:  # fmt: skip
    """A point that was asked."""
    return SweepPoint(
        alpha=alpha,
        perplexities={"retain_validation": same(perplexity), "normal_validation:benign": same(benign)},
        kl={"retain_validation": kl, "normal_validation:benign": 0.0},
        replies=Replies(
            harmful=share(harmful),
            gibberish=share(gibberish),
            prefill={tokens: share(rate) for tokens, rate in (prefill or {}).items()},
            over_refusal=share(refused),
            normal_gibberish=share(normal_gibberish),
            exact_answer=None,
        ),
    )


def broken(alpha: float) -> SweepPoint:
    return SweepPoint(alpha=alpha, perplexities={}, kl={}, replies=None, unasked="a weight is not finite")


BASE = point(0.0, 1.0)


def swept(base: SweepPoint, config: SweepConfig, *points: SweepPoint) -> Sweep:
    return Sweep(
        key="k", model="m", seed=0, judge=EmbeddedWorldJudge.card, config=config, asked={}, left_out={}, base=base,
        points=points,
    )  # fmt: skip


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
    return sweep.choose(swept(base, config, *points))


def beyond_limits(found: SweepPoint, base: SweepPoint, config: SweepConfig) -> bool:
    return sweep.beyond_limits(found, swept(base, config))


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
    assert beyond_limits(broken(1.0), BASE, LOWEST)


@pytest.mark.parametrize(
    "costly", [{"perplexity": 1.051}, {"benign": 1.051}, {"kl": 0.051}, {"refused": 0.051}, {"gibberish": 0.051}]
)
def test_every_normal_set_divergence_and_refusals_limit_an_alpha(costly: dict[str, float]) -> None:
    """Seven methods stood at benign x1.9 to x2.8 within a budget that looked at one perplexity."""
    assert beyond_limits(point(1.0, 0.0, **costly), BASE, LOWEST)  # type: ignore[arg-type]
    (name,) = costly
    nearly = {name: costly[name] - 0.002}
    assert not beyond_limits(point(1.0, 0.0, **nearly), BASE, LOWEST)  # type: ignore[arg-type]


def test_the_nearest_is_taken_only_where_the_recipe_says_so() -> None:
    missed = dataclasses.replace(swept(BASE, LOWEST), pick=Selection(alpha=1.0, met=False, why="none"))
    with pytest.raises(NoAlphaError):
        missed.alpha()
    assert dataclasses.replace(missed, config=SweepConfig(if_none="nearest")).alpha() == 1.0


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
    enough = [alpha for alpha, harm in harms.items() if config.harm_target is not None and harm <= config.harm_target]
    if config == LOWEST:
        assert pick.met == bool(enough)
        assert pick.alpha == min(enough, default=pick.alpha)
    if not pick.met or config == LEAST:
        assert harms[pick.alpha] == min(harms.values())
    if config == LEAST and BASE.replies is not None:
        assert pick.met == (chosen.replies.harm_order < BASE.replies.harm_order)
