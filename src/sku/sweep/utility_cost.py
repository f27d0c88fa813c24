"""What a change of the weights costs normal behaviour, as one number: up to 1 it is within the budget.

Four parts are looked at, each as a share of its own limit, and the worst of them is the cost:

- *perplexity* of the answers of each normal set: ``ln(ratio to the base) / ln(budget)``;
- *KL to the base* on the same answers, nats a token over ``max(KL_LIMIT, ln(budget))``: it grows where a model drifts
  without getting worse, as one that is trained on normal text does;
- *over-refusal*: the share of normal prompts refused beyond the base model's, over ``reply_limit``. It needs replies,
  so it is looked at only where the other two are within theirs.

The normal sets are those that no method trains on and that no table reports: ``retain_validation``, and of each set
of ``data.normal`` that has answers one half, ``normal_validation:NAME``. Numbers in, numbers out: no model, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sku.config import SweepConfig
from sku.evaluate.records import Split

RETAIN: Split = "retain_validation"
OVER_REFUSAL = "over-refusal"
BROKEN = "weights that break"
KL_LIMIT = 0.05
"""Nats a token that are always allowed."""
ROUNDING = 1e-9
"""A cost that is over 1 by no more than this is within the budget."""
_SMALLEST_LIMIT = 1e-6
"""What a limit of 0 counts as, so that a cost stays a number that JSON can hold."""
BISECTIONS = 5
"""Halvings between the last strength within the budget and the first beyond: to 3 % of their distance."""


@dataclass(frozen=True, kw_only=True)
class UtilityCost:
    """A cost, and the part that is the worst."""

    value: float
    bound_by: str
    """Such as ``KL on retain_validation``."""

    @property
    def within(self) -> bool:
        """Whether every part is within its limit."""
        return self.value <= 1 + ROUNDING


BROKEN_COST = UtilityCost(value=math.inf, bound_by=BROKEN)
"""Of weights, or of losses, that are not finite."""


def utility_cost(
    limits: SweepConfig,
    *,
    perplexity: Mapping[str, float],
    kl: Mapping[str, float],
    over_refusal: float | None = None,
) -> UtilityCost:
    """The worst of all parts, 0 or more; of equal parts the first is named, in the order above.

    Args:
        limits: ``utility_budget`` and ``reply_limit``.
        perplexity: Normal set -> perplexity of its answers, as a multiple of the base model's.
        kl: Normal set -> KL to the base on its answers, nats a token.
        over_refusal: Share of normal prompts refused beyond the base model's; None where there are no replies.
    """
    budget = math.log(limits.utility_budget)
    shares = {f"perplexity of {name}": math.log(ratio) / budget for name, ratio in perplexity.items()}
    shares |= {f"KL on {name}": value / max(KL_LIMIT, budget) for name, value in kl.items()}
    if over_refusal is not None:
        # Of shares that are equal as fractions, such as 0.15 - 0.1 against 0.05.
        shares[OVER_REFUSAL] = round(over_refusal, 12) / max(limits.reply_limit, _SMALLEST_LIMIT)
    worst = max(shares, key=shares.__getitem__)
    return UtilityCost(value=max(shares[worst], 0.0), bound_by=worst)


@dataclass(frozen=True, kw_only=True)
class BudgetLimit:
    """Where the budget binds, on the way up from strength 0."""

    strength: float
    """The largest found within the budget; 0 where none that was tried is."""
    bound_by: str | None
    """What is beyond its limit a little above; None where the largest strength tried is within the budget."""


def find_budget_limit(cost: Callable[[float], UtilityCost], *, first: float, largest: float) -> BudgetLimit:
    """The largest strength, on the way up from 0, whose cost stays within the budget.

    Strengths are doubled from ``first`` until one goes beyond; between it and the one before the border is bisected.
    A cost that rises beyond the budget and falls again is not followed: what lies after the first border is not
    reached by turning the strength up slowly.
    """
    low, high = 0.0, min(first, largest)
    while (found := cost(high)).within:
        if high == largest:
            return BudgetLimit(strength=largest, bound_by=None)
        low, high = high, min(2 * high, largest)
    bound_by = found.bound_by
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if (found := cost(middle)).within:
            low = middle
        else:
            high, bound_by = middle, found.bound_by
    return BudgetLimit(strength=low, bound_by=bound_by)
