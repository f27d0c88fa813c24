"""Intervals and tests on tables of seeds and prompts: arrays in, numbers out.

The crossed bootstrap draws seeds with replacement and, independently, prompts; every drawn prompt is then read under
every drawn seed. With one seed only the prompts are drawn, so an interval says nothing of other seeds; with two or
three it sees little of them. Source: Owen, The pigeonhole bootstrap, Ann. Appl. Stat. 1 (2007) 386.

Shapes: S = seeds, P = prompts or fixed answers, R = ``RESAMPLES``.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.stats import permutation_test

from sku.evaluate import statistics

RESAMPLES = 2_000
PERMUTATIONS = 9_999
_SEED = 0
"""Of all resampling: the same records always give the same numbers."""
Table = NDArray[np.float64]


@lru_cache(maxsize=16)
def draws(*sizes: int) -> tuple[Table, ...]:
    """How often each entry is drawn in each resample, for things that are drawn independently.

    Args:
        sizes: Number of entries of each thing, at least 1.

    Returns:
        One read-only ``[R, size]`` per thing; every row sums to its size.
    """
    rng = np.random.default_rng(_SEED)
    drawn = [rng.multinomial(size, np.full(size, 1 / size), size=RESAMPLES).astype(np.float64) for size in sizes]
    for table in drawn:
        table.setflags(write=False)
    return tuple(drawn)


def resampled_means(table_SP: Table, prompts_RP: Table, seeds_RS: Table) -> Table:
    """Mean of a table in each resample, ``[R]``.

    Whole numbers are summed before the one division, so that equal tables give exactly equal means.
    """
    return np.asarray(((seeds_RS @ table_SP) * prompts_RP).sum(1) / table_SP.size)


def wilson_interval(hits_SP: Table) -> tuple[float, float]:
    """Wilson 95 % interval of the mean over seeds, with as many trials as there are prompts.

    More seeds of the same prompts don't count as more prompts.
    """
    prompts = hits_SP.shape[1]
    return statistics.wilson_interval(round(hits_SP.mean() * prompts), prompts)


def newcombe_interval(a_SP: Table, b_SP: Table) -> tuple[float, float]:
    """Newcombe's score 95 % interval of ``mean a - mean b``, with as many trials as there are prompts."""
    return statistics.newcombe_interval(float(a_SP.mean()), float(b_SP.mean()), a_SP.shape[1])


def permutation_p_value(a_P: Table, b_P: Table) -> float:
    """Two-sided paired permutation test of equal means: the two values of a prompt are swapped at random.

    Exact where there are at most ``PERMUTATIONS`` ways to swap, else that many are drawn.
    """
    if len(a_P) < 2:
        return 1.0  # One pair can be swapped in two ways, both as extreme as what was found.
    found = permutation_test(
        (a_P, b_P),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=PERMUTATIONS,
        rng=np.random.default_rng(_SEED),
    )
    return float(found.pvalue)
