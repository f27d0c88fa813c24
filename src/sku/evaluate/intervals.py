"""Bootstrap intervals of means and of ratios of sums. Numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from sku.evaluate.metrics import CONFIDENCE

RESAMPLES = 10_000

Array = NDArray[np.float64]


def mean_interval(values: Sequence[float], *, seed: int) -> tuple[float, float]:
    """95 % interval of a mean, percentile bootstrap over the values.

    Args:
        values: At least one; the interval of a single value is that value twice.
        seed: Equal seeds give equal intervals.

    Returns:
        Low and high.
    """
    return _interval([values], lambda drawn, axis=-1: drawn.mean(axis), seed)


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float], *, seed: int) -> tuple[float, float]:
    """95 % interval of ``sum(numerators) / sum(denominators)``, percentile bootstrap over pairs of the two.

    A mean per token over examples of different length is such a ratio: an example is drawn with all its tokens.

    Args:
        numerators: One value an example, such as the summed divergence of its tokens.
        denominators: Such as the example's number of tokens, all above 0.
        seed: Equal seeds give equal intervals.

    Returns:
        Low and high; the ratio itself twice for a single example.
    """
    return _interval([numerators, denominators], lambda top, low, axis=-1: top.sum(axis) / low.sum(axis), seed)


def _interval(samples: Sequence[Sequence[float]], statistic: Callable[..., Array], seed: int) -> tuple[float, float]:
    arrays = tuple(np.asarray(sample, dtype=float) for sample in samples)
    value = float(statistic(*arrays))
    if len(arrays[0]) < 2:
        return value, value
    result = bootstrap(
        arrays,
        statistic,
        paired=len(arrays) > 1,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
