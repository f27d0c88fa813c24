"""Invented points of a sweep."""

from __future__ import annotations

from sku.config import SweepConfig
from sku.evaluate.judges.choose import EmbeddedWorldJudge
from sku.evaluate.metrics import Rate
from sku.evaluate.statistics import Estimate
from sku.sweep import Replies, Sweep, SweepPoint

TOTAL = 100


def share(value: float, total: int = TOTAL) -> Rate:
    return Rate(count=round(value * total), total=total, value=value, low=value, high=value)


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
