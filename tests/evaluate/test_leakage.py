"""leak@k against numbers worked out by hand and against all subsets of the drawn replies."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from sku.errors import EvaluationError
from sku.evaluate.comparison import compare
from sku.evaluate.leakage import Leak, leaks_of, leaks_per_prompt, numbers_of_draws, sample_rates
from sku.evaluate.metrics import rate
from sku.evaluate.outcomes import Outcome, ReplyOutcome
from sku.evaluate.statistics import leak_at_k

from .test_comparison import result

LETTERS: dict[str, Outcome] = {"h": "harmful", "r": "refusal", "d": "degenerate", "e": "evasive"}


def samples(*prompts: str) -> tuple[ReplyOutcome, ...]:
    """A word for each prompt, a letter for each drawn reply."""
    return tuple(
        ReplyOutcome(
            id=f"unseen-sample{sample}-p{number}", split="unseen", kind="sample", category=None,
            outcome=LETTERS[letter], judged_harmful=letter in "hd", finished=True,
        )
        for number, word in enumerate(prompts)
        for sample, letter in enumerate(word)
    )  # fmt: skip


def test_by_hand() -> None:
    """Of 4 replies 1 is harmful: 2 of them hold it with chance 1/2. With 3 harmful ones any 2 hold one."""
    assert leak_at_k([1], [4], 2) == pytest.approx(1 / 2)
    assert leak_at_k([3], [4], 2) == 1
    assert leak_at_k([0, 1, 3], [4, 4, 4], 2) == pytest.approx((0 + 1 / 2 + 1) / 3)
    assert leak_at_k([2], [8], 1) == pytest.approx(1 / 4)
    assert leak_at_k([1], [8], 8) == 1
    assert leak_at_k([0], [8], 8) == 0


@pytest.mark.parametrize("drawn", [1, 3, 5, 6])
def test_it_is_the_share_of_all_subsets(drawn: int) -> None:
    for harmful, k in itertools.product(range(drawn + 1), range(1, drawn + 1)):
        subsets = list(itertools.combinations([True] * harmful + [False] * (drawn - harmful), k))
        assert leak_at_k([harmful], [drawn], k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_many_draws_stay_finite() -> None:
    """1 - (1 - 1/5000)(1 - 1/4999)... telescopes to 2500/5000 for one harmful reply of 5,000."""
    assert leak_at_k([1], [5000], 2500) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize(("harmful", "drawn", "k"), [([], [], 1), ([1], [4], 5), ([1, 0], [4, 1], 2), ([1], [4], 0)])
def test_too_few_draws_are_refused(harmful: list[int], drawn: list[int], k: int) -> None:
    with pytest.raises(EvaluationError, match=r"set evaluate\.samples higher"):
        leak_at_k(harmful, drawn, k)


def test_numbers_of_draws() -> None:
    assert [numbers_of_draws(most) for most in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_leaks_of_replies_count_gated_harm_by_prompt() -> None:
    leaks = leaks_of(samples("hrrr", "rrrr", "hhhd", "eddd"))
    assert list(leaks) == ["1", "2", "4"]
    assert [leak.value for leak in leaks.values()] == pytest.approx([(1 / 4 + 3 / 4) / 4, (1 / 2 + 1) / 4, 2 / 4])
    for leak in leaks.values():
        assert 0 <= leak.low < leak.value < leak.high <= 1
    assert leaks_of([]) == {}
    assert leaks_per_prompt(samples("hrrr", "hhhd"), 2) == {"p0": 0.5, "p1": 1.0}


def test_where_all_prompts_say_the_same_the_interval_has_a_width() -> None:
    wilson = rate([False] * 3)
    assert wilson is not None
    assert leaks_of(samples("rr", "rr", "rr"))["2"] == Leak(value=0, low=wilson.low, high=wilson.high)
    assert wilson.high > 0.5
    assert leaks_of(samples("hr"))["1"] == Leak(value=0.5, low=0.5, high=0.5)


def test_rates_of_samples_are_over_prompts() -> None:
    """Two prompts of four replies are two observations, not eight."""
    rates = sample_rates(samples("hhhh", "rrrr"))
    assert (rates["harmful"].count, rates["harmful"].total, rates["harmful"].value) == (4, 8, 0.5)
    assert (rates["harmful"].low, rates["harmful"].high) == (0, 1)
    assert rates["harmful_ungated"].count == 4
    assert sample_rates([]) == {}


def test_samples_are_compared_over_prompts() -> None:
    """Every one of 6 prompts falls by 1/2: of the 64 sign flips 2 are as far from 0."""
    before, after = samples(*["hhhh"] * 6), samples(*["hhrr"] * 6)
    base, unlearned = (
        dataclasses.replace(
            result(["refusal"], [1.0, 2.0]),
            outcomes=rows,
            samples={"unseen": sample_rates(rows)},
            leak={"unseen": leaks_of(rows)},
            replies={},
        )
        for rows in (before, after)
    )
    found = compare(base, unlearned)
    change = found.samples["unseen"]["harmful"]
    assert (change.before.value, change.after.value, change.difference) == (1, 0.5, -0.5)
    assert -1 <= change.low < -0.5 < change.high < 0
    assert change.p_value == pytest.approx(2 / 64)
    unmoved = found.samples["unseen"]["degenerate"]
    assert unmoved.p_value == 1
    bound = 1.959964**2 / (6 + 1.959964**2)
    assert (unmoved.low, unmoved.high) == pytest.approx((-bound, bound), abs=1e-6)
    leaks = found.leak["unseen"]
    assert [leaks[k].difference for k in ("1", "2", "4")] == pytest.approx([-1 / 2, -1 / 6, 0])
    assert leaks["2"].p_value == pytest.approx(2 / 64)
    assert leaks["4"].p_value == 1
    assert (leaks["4"].low, leaks["4"].high) == (unmoved.low, unmoved.high)
