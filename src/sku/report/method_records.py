"""A comparison of methods, read from the run folders that ``sku compare`` left: rates, ratios, differences.

All 95 % intervals are percentiles of a crossed bootstrap, which draws seeds with replacement and, independently,
prompts; every drawn prompt is then read under every drawn seed. With one seed only the prompts are drawn, so an
interval says nothing of other seeds; with two or three it sees little of them. Source: Owen, The pigeonhole bootstrap,
Ann. Appl. Stat. 1 (2007) 386. Where all replies are alike (0 of 200) a bootstrap has nothing to draw from; the Wilson
interval of the number of prompts then takes its place.

Shapes: S = seeds, P = prompts or fixed answers, R = ``RESAMPLES``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sku.errors import EvaluationError
from sku.evaluate.judges import JudgeCard
from sku.evaluate.metrics import HARMFUL_PROMPT_RATES, MAX_EXPONENT, NORMAL_PROMPT_RATES, ReplyOutcome
from sku.evaluate.records import ExampleLoss, JsonArtifact, grouped, prefills_in_order, read_json_object
from sku.evaluate.results import EvaluationResult, read_result
from sku.evaluate.statistics import (
    Estimate,
    newcombe_interval,
    percentile_interval,
    sign_flip_p_value,
    wilson_interval,
)
from sku.sweep import Sweep

RESAMPLES = 2_000
_SEED = 0
"""Of all resampling: the same records always give the same numbers."""
BASE = "base"
"""Name of the row of the untouched model, which perplexities are compared with."""
UNSEEN_KEY, NORMAL_KEY = "forget_test/reply", "retain_test/reply"
PREFILL = "forget_test/prefill"
"""Begins the keys of unseen prompts that were asked with a prefill."""
_AGAIN = "run the comparison again"
Table = NDArray[np.float64]
Counted = Mapping[str, Sequence[bool]]
"""Key of ``Point.replies`` of harmful prompts -> whether each prompt enters a table, in their order."""


@dataclass(frozen=True, kw_only=True)
class RowTitle:
    """One row of the tables."""

    name: str
    title: str
    control: bool


@dataclass(frozen=True, kw_only=True)
class Comparison(JsonArtifact):
    """What ``comparison.json`` holds: what is compared, and what failed."""

    FILE, AGAIN = "comparison.json", _AGAIN

    rows: tuple[RowTitle, ...]
    """In the order of the tables."""
    seeds: tuple[int, ...]
    failed: Mapping[str, str]
    """Name of a run -> why, in one line."""


def run_name(row: str, seed: int) -> str:
    """Name of the folder of one run."""
    return f"{row}--seed{seed}"


@dataclass(frozen=True, kw_only=True)
class Point:
    """A method at one strength, evaluated."""

    strength: float
    """Multiple of what the method changed; 0 for the base model."""
    cost: float = 0.0
    """``UtilityCost`` on the validation splits."""
    replies: Mapping[str, Sequence[ReplyOutcome]]
    """``forget_test/reply``, ``retain_test/reply``, and for each prefill such as ``forget_test/prefill/3`` or
    ``forget_test/prefill/answer/20``, in the order of the prompts' ids, so that two rows can be paired."""
    losses: Mapping[str, Sequence[ExampleLoss]]
    """Split -> each fixed answer, in the order of the ids."""

    @property
    def prefills(self) -> dict[str, str]:
        """Keys of the prefills that unseen prompts were asked with, in order -> key of ``replies``."""
        found = (key.removeprefix(f"{PREFILL}/") for key in self.replies if key.startswith(f"{PREFILL}/"))
        return {prefill: f"{PREFILL}/{prefill}" for prefill in prefills_in_order(found)}

    def hits(self, key: str, hit: str) -> list[bool]:
        """Which replies are a hit by a rate of ``sku.evaluate.metrics``, in the order of the prompts.

        Of ``exact_answer`` only replies with a reference that is short enough.
        """
        rows = self.replies.get(key, ())
        if hit == "exact_answer":
            return [bool(row.exact) for row in rows if row.exact is not None]
        rates = NORMAL_PROMPT_RATES if key == NORMAL_KEY else HARMFUL_PROMPT_RATES
        return [rates[hit](row) for row in rows]


def point_of_result(result: EvaluationResult, strength: float, cost: float = 0.0) -> Point:
    """What a table shows of an evaluation with its rows."""
    replies = grouped(
        sorted(result.outcomes, key=lambda row: row.id),
        lambda row: f"{row.split}/{row.kind}" + (f"/{row.prefill_key}" if row.kind == "prefill" else ""),
    )
    shown = {key: rows for key, rows in replies.items() if key in (UNSEEN_KEY, NORMAL_KEY) or key.startswith(PREFILL)}
    losses = grouped(sorted(result.losses, key=lambda row: row.id), lambda row: row.split)
    return Point(strength=strength, cost=cost, replies=shown, losses=losses)


@dataclass(frozen=True, kw_only=True)
class MethodRecord:
    """One row of the comparison, trained with one seed."""

    name: str
    title: str
    control: bool
    seed: int
    """Of the training."""
    failure: str | None = None
    """One line on why it failed, else None."""
    point: Point | None = None
    """At the chosen strength; None where it failed, or no strength is within the budget."""
    bound_by: str | None = None
    """What is beyond its limit a little above the largest strength within the budget; None where nothing is, up to the
    largest strength tried."""
    judge: JudgeCard | None = None
    """None without a point."""


def read_records(folder: Path) -> list[MethodRecord]:
    """Reads the runs of a comparison, in the order of its rows and of the seeds; the base model stands last.

    Raises:
        EvaluationError: There is none, a file of one is broken, or two were asked different things.
    """
    comparison = Comparison.read(folder)
    records: list[MethodRecord] = []
    for row in comparison.rows:
        for seed in comparison.seeds:
            name = run_name(row.name, seed)
            if name in comparison.failed:
                records.append(MethodRecord(**vars(row), seed=seed, failure=comparison.failed[name]))
            elif _is_complete(folder / name):
                records.append(_read_run(folder / name, row, seed))
    complete = next((record for record in records if record.failure is None), None)
    if complete is not None:
        result = read_result(folder / run_name(complete.name, complete.seed) / "evaluation" / BASE)
        records.append(MethodRecord(
            name=BASE, title="Base model", control=True, seed=complete.seed, judge=result.judge,
            point=point_of_result(result, 0.0),
        ))  # fmt: skip
    _check_asked_alike(records, folder)
    return records


def _is_complete(place: Path) -> bool:
    """One in which no strength will do is complete, too."""
    manifest = place / "manifest.json"
    return manifest.exists() and read_json_object(manifest, _AGAIN).get("status") in ("complete", "no_alpha")


def _read_run(place: Path, row: RowTitle, seed: int) -> MethodRecord:
    sweep = Sweep.read(place / "sweep")
    record = MethodRecord(**vars(row), seed=seed, bound_by=None if sweep.border is None else sweep.border.bound_by)
    alpha = None if sweep.pick is None else sweep.pick.alpha
    chosen = next((point for point in sweep.points if point.alpha == alpha), None)
    if chosen is None:
        return record
    result = read_result(place / "evaluation" / "unlearned")
    point = point_of_result(result, chosen.alpha, sweep.cost(chosen).value)
    return dataclasses.replace(record, point=point, judge=result.judge)


def _check_asked_alike(records: Sequence[MethodRecord], folder: Path) -> None:
    """Refuses records that can't stand in one table: of other prompts, fixed answers or judges."""
    first: dict[str, Any] = {}
    for record, point in ((record, record.point) for record in records if record.point is not None):
        asked = {
            "prompts": {key: [row.id for row in rows] for key, rows in point.replies.items()},
            "fixed answers": {
                split: [(row.id, row.tokens) for row in rows]
                for split, rows in point.losses.items()
                if not split.startswith("forget_train")
            },
            "judges": None if record.judge is None else record.judge.key,
        }
        first = first or asked | {"name": run_name(record.name, record.seed)}
        for what, found in asked.items():
            if found != first[what]:
                raise EvaluationError(
                    f"{first['name']} and {run_name(record.name, record.seed)} in {folder} have different {what}: "
                    "compare only what was run on the same data with the same settings"
                )


@dataclass(frozen=True, kw_only=True)
class Difference(Estimate):
    """Rate of one row minus the rate of another, on the same prompts."""

    p_value: float
    """Two-sided permutation test of no difference, before any correction for several tests."""


def points_of(records: Iterable[MethodRecord], counted: Counted | None = None) -> list[Point]:
    """The points of one row in order of the seeds, with the prompts of ``counted_of``, or all."""
    ordered = sorted(records, key=lambda record: record.seed)
    return [_only(record.point, counted or {}) for record in ordered if record.point is not None]


def counted_of(records: Iterable[MethodRecord]) -> Counted:
    """The prompts that all rows of a table have the judge's verdict for: a row that babbles gets no more."""
    failed: dict[str, list[list[bool]]] = {}
    for point in points_of(records):
        for key in point.replies.keys() - {NORMAL_KEY}:
            failed.setdefault(key, []).append(point.hits(key, "no_verdict"))
    return {key: (np.sum(rows, axis=0) == 0).tolist() for key, rows in failed.items()}


def harm_bounds(points: Sequence[Point], key: str, hit: str) -> tuple[float, float]:
    """A harmful rate over all prompts, those without a verdict taken for harmless, and for harmful.

    To ``harmful``, other than to ``harmful_ungated``, gibberish is harmless also without a verdict.
    """
    return float(_hits(points, key, hit).mean()), float(_hits(points, key, f"{hit}_upper_bound").mean())


def _only(point: Point, counted: Counted) -> Point:
    shown = {
        key: list(compress(rows, counted[key])) if key in counted else rows for key, rows in point.replies.items()
    }
    return dataclasses.replace(point, replies=shown)


def worst_prefill(*rows: Sequence[Point], hit: str = "harmful") -> str | None:
    """Key of the prefill after which most replies to unseen prompts are harmful, of equals the first in order.

    Of those that all points of all rows were asked with, rows counting alike; None where there is none.
    """
    asked = [set(point.prefills) for row in rows for point in row]

    def share(point: Point, prefill: str) -> float:
        hits = point.hits(point.prefills[prefill], hit)
        return sum(hits) / max(len(hits), 1)

    def harm(prefill: str) -> float:
        return math.fsum(math.fsum(share(point, prefill) for point in row) / len(row) for row in rows if row)

    common = set[str].intersection(*asked) if asked else set[str]()
    return max(prefills_in_order(common), key=harm, default=None)


def rate(points: Sequence[Point], key: str, hit: str) -> Estimate | None:
    """Share of the replies of one row that are a hit, mean over seeds and prompts; None where nothing was asked.

    ``key`` is one of ``Point.replies``, or ``PREFILL`` for the worst of those tried.
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


def perplexity_ratio(points: Sequence[Point], base: Point, split: str) -> Estimate | None:
    """Perplexity of fixed answers over the base model's: geometric mean over seeds.

    Per seed ``exp((sum of nll - sum of the base's nll) / sum of tokens)``, at most ``e^700`` (``MAX_EXPONENT``). In
    the bootstrap an answer's tokens and all its losses are drawn together. None where the split was not measured.
    """
    if not points or any(split not in point.losses for point in (*points, base)):
        return None
    tokens_P = np.asarray([row.tokens for row in base.losses[split]], dtype=np.float64)
    nll_SP = np.asarray([[row.nll for row in point.losses[split]] for point in (base, *points)])
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
    key: str,
    hit: str,
    counted: Counted | None = None,
) -> Difference | None:
    """Rate of row a minus rate of row b, paired by prompt.

    Interval: crossed bootstrap over the same prompts for both rows. Where both rows have the same seeds, these are
    drawn together too, else for each row by itself. Where all prompts differ alike, or none, Newcombe's score
    interval for two rates takes its place.

    p: paired permutation test on each prompt's means over seeds. It speaks of other prompts, not of other seeds.

    ``key`` is one of ``Point.replies``, or ``PREFILL``: the length that is the worst for both rows together. None
    where a row has no such point or nothing was asked.
    """
    both = [points_of(records, counted) for records in (records_a, records_b)]
    key = f"{PREFILL}/{worst_prefill(*both, hit=hit)}" if key == PREFILL else key
    a_SP, b_SP = (_hits(points, key, hit) for points in both)
    if a_SP.size == 0 or b_SP.size == 0:
        return None
    value = float(a_SP.mean() - b_SP.mean())
    seeds_a, seeds_b = (
        {record.seed for record in records if record.point is not None} for records in (records_a, records_b)
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
    return np.asarray([point.hits(key, hit) for point in points], dtype=np.float64)


@lru_cache(maxsize=16)
def draws(*sizes: int) -> tuple[Table, ...]:
    """How often each entry is drawn in each resample, for things that are drawn independently.

    One read-only ``[R, size]`` per thing; every row sums to its size, which is at least 1.
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
