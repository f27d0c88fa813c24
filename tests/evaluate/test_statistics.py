"""Statistics against closed forms, scipy and simulation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import bootstrap

from sku.errors import EvaluationError
from sku.evaluate.statistics import (
    Estimate,
    JudgeErrors,
    clustered_bootstrap,
    corrected_rate,
    non_inferiority,
    paired_interval,
    prompts_needed,
    wilson_interval,
)

EXACT = 1e-12


@pytest.mark.parametrize(("rose", "fell", "total"), [(0, 0, 44), (1, 0, 44), (3, 7, 60), (12, 9, 50), (20, 0, 20)])
def test_an_interval_of_paired_rates_holds_what_a_score_test_does_not_refuse(rose: int, fell: int, total: int) -> None:
    """Tango: the likeliest share that fell, given the difference, is found here by trying many."""
    same = total - rose - fell

    def score(difference: float) -> float:
        q_N = np.linspace(max(0.0, -difference), (1 - difference) / 2, 200_001)[1:-1]
        loglik_N = rose * np.log(q_N + difference) + fell * np.log(q_N) + same * np.log1p(-2 * q_N - difference)
        variance = total * (2 * q_N[loglik_N.argmax()] + difference * (1 - difference))
        return float((rose - fell - total * difference) / math.sqrt(variance))

    low, high = paired_interval(rose, fell, total)
    assert low < (rose - fell) / total <= high
    assert low == pytest.approx(-paired_interval(fell, rose, total)[1])
    assert score(low) == pytest.approx(1.96, abs=0.01)
    if high < 1:
        assert score(high) == pytest.approx(-1.96, abs=0.01)
    else:
        assert rose == total


@pytest.mark.parametrize(
    ("rose", "fell", "total", "needed"),
    [(0, 0, 44, 73), (1, 0, 44, 246), (3, 0, 44, 57), (49, 0, 1000, None)],
)
def test_prompts_that_would_decide(rose: int, fell: int, total: int, needed: int | None) -> None:
    """73 = z^2 .95 / .05; so many prompts put the bound on the margin, or, above the margin, show a rise."""
    assert prompts_needed(rose, fell, total, 0.05) == needed
    if needed is not None:
        more = round(rose * 20 * needed / total), round(fell * 20 * needed / total), 20 * needed
        low, high = paired_interval(*more)
        assert (high < 0.05) if (rose - fell) / total < 0.05 else (low > 0)
        if rose == fell == 0:
            assert paired_interval(0, 0, needed - 1)[1] > 0.05 >= paired_interval(0, 0, needed)[1]


def test_a_ratio_of_sums_is_the_paired_bootstrap_of_scipy() -> None:
    rng = np.random.default_rng(6)
    tokens = rng.integers(1, 40, size=60).astype(float)
    losses = tokens * rng.gamma(4, 0.5, size=60)
    found = clustered_bootstrap(
        losses, tokens, clusters=range(60), statistic=lambda nll, count: np.exp(nll / count), seed=0
    )
    plain = bootstrap(
        (losses, tokens), lambda nll, count, axis: np.exp(nll.sum(axis) / count.sum(axis)), paired=True,
        n_resamples=10_000, method="percentile", rng=np.random.default_rng(1),
    )  # fmt: skip
    assert found == pytest.approx(tuple(plain.confidence_interval), rel=0.01)


def test_rows_of_a_cluster_are_drawn_together() -> None:
    """Two clusters of 0 0 0 and 1: a resample holds 0, 1/4 or 1 hits in share, never 1/2."""
    seen: set[float] = set()

    def share(hits: NDArray[np.float64], rows: NDArray[np.float64]) -> NDArray[np.float64]:
        seen.update(np.unique(hits / rows).tolist())
        return hits / rows

    clustered_bootstrap([0, 0, 0, 1], np.ones(4), clusters=["a", "a", "a", "b"], statistic=share, seed=0)
    assert seen == {0.0, 0.25, 1.0}


@pytest.mark.parametrize(
    ("kl", "kept"),
    [
        (Estimate(value=0.01, low=0.005, high=0.0487), "kept"),
        (Estimate(value=0.05, low=0.048, high=0.06), "unclear"),
        (Estimate(value=0.67, low=0.5, high=0.8), "lost"),
        (None, "unclear"),
    ],
)
def test_utility_is_kept_only_where_the_divergence_is_small_too(kl: Estimate | None, kept: str) -> None:
    """The run with KL 0.67 nats had a perplexity ratio within the margin."""
    bounds = {(0.99, 1.01): kept, (1.02, 1.0499): kept, (1.02, 1.05): "unclear", (1.0501, 1.08): "lost"}
    for (low, high), verdict in bounds.items():
        found = non_inferiority((low + high) / 2, (low, high), 1.05, kl=kl)
        assert found.verdict == (verdict if kept != "lost" else "lost")


def test_a_judge_measures_above_its_floor_and_where_little_is_harmful() -> None:
    """The refusal rules: 988 of 1,074 safe replies are called harmful, 92 %."""
    rules = JudgeErrors(harmful=1402, harmful_found=1383, safe=1074, safe_found=86)
    for count, total, measured in ((180, 200, False), (200, 200, True), (100, 200, False), (0, 200, True)):
        assert rules.can_measure(count / total, wilson_interval(count, total)[0]) == measured
    guard = JudgeErrors(harmful=100, harmful_found=95, safe=100, safe_found=95)
    assert guard.can_measure(0.3, 0.2)
    assert not guard.can_measure(0.3, 0.2, replies=8)  # 1 - 0.95^8 = 0.34


ERRORS = JudgeErrors(harmful=100, harmful_found=90, safe=200, safe_found=180)


def corrected(harmful: int, total: int, errors: JudgeErrors = ERRORS, seed: int = 0) -> tuple[float, float, float]:
    hits = [index < harmful for index in range(total)]
    found = corrected_rate(hits, errors, clusters=range(total), judge="a judge", seed=seed)
    return found.value, found.low, found.high


def test_a_corrected_rate_and_no_harm_found() -> None:
    """(0.3 + 0.9 - 1) / (0.9 + 0.9 - 1) = 0.25. 0 of 200: the interval doesn't shrink to 0."""
    found = corrected_rate([index < 60 for index in range(200)], ERRORS, clusters=range(200), judge="a judge", seed=0)
    assert found.value == pytest.approx(0.25, abs=EXACT)
    assert 0.1 < found.low < 0.25 < found.high < 0.4
    errors = JudgeErrors(harmful=100, harmful_found=95, safe=100, safe_found=100)
    value, low, high = corrected(0, 200, errors)
    assert (value, low) == (0, 0)
    assert 0.005 < high < 0.03


def test_a_judge_that_tells_nothing_is_refused() -> None:
    blind = JudgeErrors(harmful=100, harmful_found=40, safe=100, safe_found=60)
    assert blind.tells_nothing
    with pytest.raises(EvaluationError, match="a judge"):
        corrected(5, 10, blind)


def _covered(intervals: Sequence[tuple[float, float]], truth: float) -> float:
    return float(np.mean([low <= truth <= high for low, high in intervals]))


def test_coverage_of_a_corrected_rate() -> None:
    """400 evaluations, each with a calibration of its own."""
    truth, sensitivity, specificity, prompts, labelled = 0.3, 0.85, 0.9, 100, 150
    rng = np.random.default_rng(11)
    intervals = []
    for seed in range(400):
        observed = rng.binomial(prompts, truth * sensitivity + (1 - truth) * (1 - specificity))
        errors = JudgeErrors(
            harmful=labelled,
            harmful_found=int(rng.binomial(labelled, sensitivity)),
            safe=labelled,
            safe_found=int(rng.binomial(labelled, specificity)),
        )
        # Few seeds for the draw of prompts, which is kept: the draw of labelled replies goes with it.
        intervals.append(corrected(int(observed), prompts, errors, seed % 4)[1:])
    assert 0.92 <= _covered(intervals, truth) <= 0.985
