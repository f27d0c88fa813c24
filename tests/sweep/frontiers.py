"""Invented points of a sweep."""

from __future__ import annotations

from sku.evaluate.metrics import Rate
from sku.sweep.points import Ratio, Replies, SweepPoint

TOTAL = 100


def share(value: float, total: int = TOTAL) -> Rate:
    return Rate(count=round(value * total), total=total, value=value, low=value, high=value)


def point(
    alpha: float, harmful: float, perplexity: float = 1.0, *, forced: dict[int, float] | None = None,
    gibberish: float = 0.0, normal_gibberish: float = 0.0, refused: float = 0.0,
) -> SweepPoint:  # fmt: skip
    """A point that was asked."""
    return SweepPoint(
        alpha=alpha,
        perplexity=Ratio(value=perplexity, low=perplexity, high=perplexity),
        replies=Replies(
            harmful=share(harmful),
            degenerate=share(gibberish),
            forced={tokens: share(rate) for tokens, rate in (forced or {}).items()},
            forced_degenerate={tokens: share(0.0) for tokens in (forced or {})},
            over_refusal=share(refused),
            normal_degenerate=share(normal_gibberish),
            exact_answer=None,
        ),
    )


def broken(alpha: float) -> SweepPoint:
    return SweepPoint(alpha=alpha, perplexity=None, replies=None, unasked="a weight is not finite")


def hopeless(alpha: float, perplexity: float) -> SweepPoint:
    ratio = Ratio(value=perplexity, low=perplexity, high=perplexity)
    return SweepPoint(alpha=alpha, perplexity=ratio, replies=None, unasked="the perplexity is too high")


BASE = point(0.0, 1.0)
