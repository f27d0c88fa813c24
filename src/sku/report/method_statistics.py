"""Rates, perplexity ratios and differences of a comparison, with intervals over training seeds and prompts.

All 95 % intervals are percentiles of a crossed bootstrap, which draws seeds with
replacement and, independently, prompts; every drawn prompt is then read under every drawn seed. With one seed only the
prompts are drawn, so an interval says nothing of other seeds; with two or three it sees little of them. Source: Owen,
The pigeonhole bootstrap, Ann. Appl. Stat. 1 (2007) 386. Where all replies are alike
(0 of 200) a bootstrap has nothing to draw from; the Wilson interval of the number of prompts then takes its place.

Shapes: S = seeds, P = prompts or fixed answers, R = ``RESAMPLES``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from sku.errors import EvaluationError
from sku.evaluate.metrics import MAX_EXPONENT
from sku.evaluate.records import prefills_in_order
from sku.evaluate.statistics import (
    Estimate,
    newcombe_interval,
    percentile_interval,
    sign_flip_p_value,
    wilson_interval,
)
from sku.report.method_records import NORMAL_KEY, PREFILL, MethodRecord, Point, Role

RESAMPLES = 2_000
_SEED = 0
"""Of all resampling: the same records always give the same numbers."""
Table = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Difference(Estimate):
    """Rate of one row minus the rate of another, on the same prompts."""

    p_value: float
    """Two-sided permutation test of no difference, before any correction for several tests."""


Counted = Mapping[str, Sequence[bool]]
"""Key of ``Point.replies`` of harmful prompts -> whether each prompt enters a table, in their order."""


def points_of(records: Iterable[MethodRecord], role: Role, counted: Counted | None = None) -> list[Point]:
    """The points of one row that have a role, one per seed, in order of the seeds.

    Args:
        records: Of one row.
        role: Which of their points.
        counted: From ``counted_of``, of all rows of the table; every prompt if None.
    """
    ordered = sorted(records, key=lambda record: record.seed)
    return [_only(record.points[role], counted or {}) for record in ordered if role in record.points]


def counted_of(records: Iterable[MethodRecord], role: Role) -> Counted:
    """The prompts that all rows of a table have the judge's verdict for: a row that babbles gets no more than others.

    Raises:
        EvaluationError: The points hold different numbers of replies.
    """
    failed: dict[str, list[list[bool]]] = {}
    for point in points_of(records, role):
        for key in point.replies.keys() - {NORMAL_KEY}:
            failed.setdefault(key, []).append(point.hits(key, "no_verdict"))
    return {key: (_stacked(rows, key).sum(axis=0) == 0).tolist() for key, rows in failed.items()}


def harm_bounds(points: Sequence[Point], key: str, hit: str) -> tuple[float, float]:
    """A harmful rate over all prompts, those without a verdict taken for harmless, and for harmful.

    Args:
        points: Of one row, with every prompt; at least one.
        key: Of ``Point.replies``, of prompts that were asked.
        hit: ``harmful_ungated``, or ``harmful``, to which gibberish is harmless also without a verdict.
    """
    return float(_hits(points, key, hit).mean()), float(_hits(points, key, f"{hit}_upper_bound").mean())


def _only(point: Point, counted: Counted) -> Point:
    shown = {
        key: list(compress(rows, counted[key])) if key in counted else rows for key, rows in point.replies.items()
    }
    return dataclasses.replace(point, replies=shown)


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits) if hits else 0.0


def worst_prefill(*rows: Sequence[Point], hit: str = "harmful") -> str | None:
    """Key of the prefill after which most replies to unseen prompts are harmful, of equals the first in order.

    Args:
        rows: Points of one row, or of several that are compared: all count alike.
        hit: The harmful rate that decides.

    Returns:
        One of those that all points were asked with; None where there is none.
    """
    asked = [set(point.prefills) for row in rows for point in row]

    def harm(prefill: str) -> float:
        shares = [[_share(point.hits(point.prefills[prefill], hit)) for point in row] for row in rows if row]
        return math.fsum(math.fsum(row) / len(row) for row in shares)

    common = set[str].intersection(*asked) if asked else set[str]()
    return max(prefills_in_order(common), key=harm, default=None)


def rate(points: Sequence[Point], key: str, hit: str) -> Estimate | None:
    """Share of replies that are a hit, over seeds and prompts.

    Args:
        points: Of one row, one per seed.
        key: Of ``Point.replies``, ``forget_test/reply`` for example, or ``PREFILL`` for the worst of those tried.
        hit: What is counted.

    Returns:
        Mean over seeds and prompts; None where nothing was asked or no seed has such a point.

    Raises:
        EvaluationError: The seeds were asked different numbers of prompts.
    """
    hits_SP = _hits(points, f"{PREFILL}/{worst_prefill(points)}" if key == PREFILL else key, hit)
    if hits_SP.size == 0:
        return None
    (seeds, prompts), value = hits_SP.shape, float(hits_SP.mean())
    if hits_SP.min() == hits_SP.max():
        # More seeds of the same prompts don't count as more prompts.
        low, high = wilson_interval(round(value * prompts), prompts)
    else:
        low, high = percentile_interval(resampled_means(hits_SP, *draws(prompts, seeds)))
    return Estimate(value=value, low=low, high=high)


def perplexity_ratio(points: Sequence[Point], base_record: MethodRecord, split: str) -> Estimate | None:
    """Perplexity of fixed answers over the base model's: geometric mean over seeds.

    Per seed ``exp((sum of nll - sum of the base's nll) / sum of tokens)``, at most ``e^700`` (``MAX_EXPONENT``). In
    the bootstrap an answer's tokens and all its losses are drawn together.

    Args:
        points: Of one row, one per seed.
        base_record: Of the base model; its published point is read.
        split: Whose answers.

    Returns:
        1 is no change; None where the split was not measured or no seed has such a point.

    Raises:
        EvaluationError: The losses belong to different numbers of answers.
    """
    base = base_record.points.get("published")
    if not points or base is None or any(split not in point.losses for point in (*points, base)):
        return None
    tokens_P = np.asarray([row.tokens for row in base.losses[split]], dtype=np.float64)
    nll_SP = _stacked([[row.nll for row in point.losses[split]] for point in (base, *points)], split)
    rise_SP = nll_SP[1:] - nll_SP[0]
    if tokens_P.size == 0:
        return None
    answers_RP, seeds_RS = draws(len(tokens_P), len(points))
    logs_S = np.minimum(rise_SP.sum(1) / tokens_P.sum(), MAX_EXPONENT)
    logs_RS = np.minimum(answers_RP @ rise_SP.T / (answers_RP @ tokens_P)[:, None], MAX_EXPONENT)
    low, high = percentile_interval((logs_RS * seeds_RS).mean(1))
    return Estimate(value=math.exp(logs_S.mean()), low=math.exp(low), high=math.exp(high))


def difference_to(
    records_a: Sequence[MethodRecord],
    records_b: Sequence[MethodRecord],
    role: Role,
    key: str,
    hit: str,
    counted: Counted | None = None,
) -> Difference | None:
    """Rate of row a minus rate of row b, paired by prompt.

    Interval: crossed bootstrap over the same prompts for both rows. Where both rows have the same seeds, these are
    drawn together too, else for each row by itself. Where all prompts differ alike, or none, Newcombe's score
    interval for two rates takes its place.

    p: paired permutation test on each prompt's means over seeds. It speaks of other prompts, not of other seeds.

    Args:
        records_a: Of one row.
        records_b: Of another.
        role: Which of their points.
        key: Of ``Point.replies``, or ``PREFILL``: the length that is the worst for both rows together.
        hit: What is counted.
        counted: The prompts of the table, as of ``points_of``.

    Returns:
        None where a row has no such point or nothing was asked.

    Raises:
        EvaluationError: The rows were asked different numbers of prompts.
    """
    both = [points_of(records, role, counted) for records in (records_a, records_b)]
    key = f"{PREFILL}/{worst_prefill(*both, hit=hit)}" if key == PREFILL else key
    a_SP, b_SP = (_hits(points, key, hit) for points in both)
    if a_SP.size == 0 or b_SP.size == 0:
        return None
    if a_SP.shape[1] != b_SP.shape[1]:
        raise EvaluationError(
            f"{key}: the rows hold {a_SP.shape[1]} and {b_SP.shape[1]} replies, so they can't be paired; run them "
            "again on the same data"
        )
    value = float(a_SP.mean() - b_SP.mean())
    seeds_a, seeds_b = (
        {record.seed for record in records if role in record.points} for records in (records_a, records_b)
    )
    prompts_RP, a_RS, b_RS = draws(a_SP.shape[1], len(a_SP), len(b_SP))
    b_RS = a_RS if seeds_a == seeds_b else b_RS
    means_R = resampled_means(a_SP, prompts_RP, a_RS) - resampled_means(b_SP, prompts_RP, b_RS)
    if np.ptp(means_R):
        low, high = percentile_interval(means_R)
    else:
        low, high = newcombe_interval(float(a_SP.mean()), float(b_SP.mean()), a_SP.shape[1])
    return Difference(
        value=value, low=low, high=high, p_value=sign_flip_p_value(a_SP.mean(0) - b_SP.mean(0), seed=_SEED)
    )


def _hits(points: Sequence[Point], key: str, hit: str) -> Table:
    """``[S, P]``, 1 for a hit; empty where nothing was asked."""
    return _stacked([point.hits(key, hit) for point in points], key)


def _stacked(rows: Sequence[Sequence[float]], what: str) -> Table:
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise EvaluationError(
            f"{what}: the records hold {' and '.join(map(str, sorted(lengths)))} entries; run them again on the same "
            "data"
        )
    return np.asarray(rows, dtype=np.float64)


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
