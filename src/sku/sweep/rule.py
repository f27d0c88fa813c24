"""From a frontier to one alpha, and the sentences that say why, or what to set. Numbers in, words out: no model.

An alpha is *within limits* where its utility cost (``sku.evaluate.utility_cost``) is within the budget and its
gibberish within the base model's share plus ``gibberish_limit``. Its *harm* is the largest of its harmful rates,
freely answered and after each prefill; of equals, the mean of all rates tells less from more. Observed rates
decide, not the ends of their intervals.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sku.config import SweepConfig
from sku.errors import EvaluationError
from sku.evaluate.metrics import Rate
from sku.evaluate.statistics import Estimate
from sku.evaluate.utility_cost import BROKEN_COST, RETAIN, UtilityCost, utility_cost

FREE = 0
"""Tokens of the prefill of a free reply."""


def worst_then_mean(shares: Collection[float]) -> tuple[float, float]:
    """What tells less harm from more: the largest share, and of equals the mean of all."""
    return max(shares), math.fsum(shares) / len(shares)


@dataclass(frozen=True, kw_only=True)
class Replies:
    """What the replies at one alpha came to."""

    harmful: Rate
    """Free replies to harmful prompts; one that the judge failed on counts as harmful."""
    gibberish: Rate
    """Gibberish among them."""
    prefill: Mapping[int, Rate] = field(default_factory=dict)
    """Tokens of the prefill -> harmful continuations."""
    prefill_gibberish: Mapping[int, Rate] = field(default_factory=dict)
    over_refusal: Rate
    """Normal prompts that were refused."""
    normal_gibberish: Rate
    """Gibberish among the replies to normal prompts."""
    exact_answer: Rate | None
    """Normal prompts with a short answer that was given word for word; None where no answer is short enough."""

    @property
    def harm(self) -> tuple[int, Rate]:
        """The largest harmful rate and the tokens of the prefill that it needs, ``FREE`` for none."""
        rates = {FREE: self.harmful, **self.prefill}
        return max(rates.items(), key=lambda entry: (entry[1].value, -entry[0]))

    @property
    def harm_order(self) -> tuple[float, float]:
        """``worst_then_mean`` of the harmful rates."""
        return worst_then_mean([self.harmful.value, *(rate.value for rate in self.prefill.values())])


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One alpha."""

    alpha: float
    perplexities: Mapping[str, Estimate]
    """Normal set -> perplexity of its answers as a multiple of the base model's; empty where the weights broke."""
    kl: Mapping[str, float]
    """Normal set -> KL to the base on its answers, nats a token; empty where the weights broke."""
    replies: Replies | None
    """None where the model was not asked, for the reason below."""
    unasked: str = ""

    @property
    def perplexity(self) -> Estimate | None:
        """That of ``retain_validation``."""
        return self.perplexities.get(RETAIN)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        plain = dataclasses.asdict(self)
        for name in ("prefill", "prefill_gibberish") if self.replies is not None else ():
            plain["replies"][name] = {str(tokens): rate for tokens, rate in plain["replies"][name].items()}
        return plain


@dataclass(frozen=True, kw_only=True)
class Pick:
    """What a rule chose."""

    alpha: float | None
    """The chosen alpha, or the nearest where none does what the rule asks for; None where none is within limits."""
    met: bool
    """Whether it does what the rule asks for."""
    why: str
    """One sentence."""
    todo: str = ""
    """Where it is not met, the settings to change, with values that would have done where they are known."""


def choose(points: Sequence[SweepPoint], base: SweepPoint, config: SweepConfig) -> Pick:
    """Applies ``config.rule``.

    Args:
        points: In any order; those that were not asked are beyond the limits.
        base: The base model, alpha 0, with replies.
        config: Rule, target, budget and limits.

    Returns:
        The alpha and why; ``lowest_alpha`` asks for ``harm_target``, ``least_harm`` for less harm than the base has.

    Raises:
        EvaluationError: The base model was not asked.
    """
    original = _asked(base)
    fitting = [point for point in points if not beyond_limits(point, base, config)]
    limits = "within the utility budget and the limits"
    beyond = [point for point in points if point not in fitting and _does(point, base, config)]
    if not fitting:
        why = f"none of {len(points)} alphas stays {limits}: {_gentlest(points, base, config)}"
        asked = [point for point in points if point.replies is not None]
        return Pick(alpha=None, met=False, why=why, todo=_mend_limits(beyond or asked, points, base, config))
    least = min(fitting, key=lambda point: (_asked(point).harm_order, _cost(point, base, config), point.alpha))
    raised = _raise_limits(beyond, base, config)
    if config.rule == "least_harm":
        if _asked(least).harm_order >= original.harm_order:
            why = f"no alpha {limits} lowers the base model's harm of {_percent(original.harm[1].value)}"
            todo = raised or "train stage 1 further (acquire.training.max_steps), or on more harmful pairs"
            return Pick(alpha=least.alpha, met=False, why=why, todo=todo)
        why = f"alpha {least.alpha:g} leaves the least harm {limits}: {_account(least, base, config)}"
        return Pick(alpha=least.alpha, met=True, why=why)
    enough = [point for point in fitting if meets_target(point, config)]
    if enough:
        lowest = min(enough, key=lambda point: point.alpha)
        target = f"brings harm to {_percent(config.harm_target)} {limits}"
        why = f"alpha {lowest.alpha:g} is the lowest that {target}: {_account(lowest, base, config)}"
        return Pick(alpha=lowest.alpha, met=True, why=why)
    target = f"none of {len(points)} alphas brings harm to {_percent(config.harm_target)} {limits}"
    why = f"{target}; the nearest is {least.alpha:g}: {_account(least, base, config)}"
    harm = _asked(least).harm[1].value
    choices = [f"set negate.alpha: {least.alpha:g} or sweep.if_none: nearest to take the nearest"]
    choices += [f"sweep.harm_target: {_above(harm)} to ask for no more than it does"] if harm < 1 else []
    choices += [raised] if raised else []
    return Pick(alpha=least.alpha, met=False, why=why, todo=", or ".join(choices))


def cost_of(point: SweepPoint, base: SweepPoint, config: SweepConfig) -> UtilityCost:
    """What an alpha costs normal behaviour; over-refusal is a part of it where the model was asked.

    Args:
        point: The alpha.
        base: The base model, with replies.
        config: Budget and limits.

    Returns:
        The cost, infinite where the weights broke.
    """
    if not point.perplexities:
        return BROKEN_COST
    refused = None
    if point.replies is not None:
        refused = point.replies.over_refusal.value - _asked(base).over_refusal.value
    ratios = {name: ratio.value for name, ratio in point.perplexities.items()}
    return utility_cost(config, perplexity=ratios, kl=point.kl, over_refusal=refused)


def meets_target(point: SweepPoint, config: SweepConfig) -> bool:
    """Whether a point's harm is within ``harm_target``; false where it was not asked."""
    return point.replies is not None and point.replies.harm[1].value <= config.harm_target


def beyond_limits(point: SweepPoint, base: SweepPoint, config: SweepConfig) -> bool:
    """Whether a point costs more than budget and limits allow; true where it was not asked."""
    if point.replies is None:
        return True
    return not cost_of(point, base, config).within or _gibberish(point, base) > config.gibberish_limit


def is_hopeless(point: SweepPoint, config: SweepConfig) -> bool:
    """Whether a larger alpha need not be tried: weights that broke, or a perplexity beyond ``hopeless_ratio``."""
    return point.perplexity is None or point.perplexity.value > config.hopeless_ratio


def _does(point: SweepPoint, base: SweepPoint, config: SweepConfig) -> bool:
    """Whether a point does what the rule asks for, whatever it costs."""
    if config.rule == "lowest_alpha":
        return meets_target(point, config)
    return point.replies is not None and point.replies.harm_order < _asked(base).harm_order


def _gibberish(point: SweepPoint, base: SweepPoint) -> float:
    """The larger excess over the base model's shares, in replies to harmful and to normal prompts."""
    found, original = _asked(point), _asked(base)
    excess = (
        found.gibberish.value - original.gibberish.value,
        found.normal_gibberish.value - original.normal_gibberish.value,
    )
    # Of shares that are equal as fractions, such as 0.15 - 0.1 against 0.05.
    return round(max(excess), 12)


def _mend_limits(
    candidates: Sequence[SweepPoint], points: Sequence[SweepPoint], base: SweepPoint, config: SweepConfig
) -> str:
    """What to set where nothing is within limits."""
    raised = _raise_limits(candidates, base, config)
    if raised:
        best = min(candidates, key=lambda point: (_cost(point, base, config), point.alpha))
        return f"{raised}, or set negate.alpha: {best.alpha:g} to take it as it is"
    smallest = min((point.alpha for point in points), default=None)
    smaller = "" if smallest is None else f"set sweep.alphas to values below {smallest:g}, or "
    return f"{smaller}train stage 1 with a lower acquire.training.learning_rate or fewer acquire.training.max_steps"


def _raise_limits(candidates: Sequence[SweepPoint], base: SweepPoint, config: SweepConfig) -> str:
    """``raise sweep.x to 1.08 for alpha 2``, of the candidate that costs least; empty where no setting would do."""
    for point in sorted(candidates, key=lambda point: (_cost(point, base, config), point.alpha)):
        found = _asked(point)
        ratios = [ratio.value for ratio in point.perplexities.values()]
        needed = {
            "utility_budget": max(ratios),
            "kl_budget": max(point.kl.values()),
            "over_refusal_limit": found.over_refusal.value - _asked(base).over_refusal.value,
            "gibberish_limit": _gibberish(point, base),
        }
        raised = {name: value for name, value in needed.items() if value > getattr(config, name)}
        shares = [value for name, value in raised.items() if name.endswith("_limit")]
        if raised and all(value < 0.999 for value in shares):  # A limit of 1 would be none.
            settings = " and ".join(f"sweep.{name} to {_above(value)}" for name, value in raised.items())
            return f"raise {settings} for alpha {point.alpha:g}"
    return ""


def _above(value: float) -> str:
    """A number with three decimals that is not below the given one."""
    return f"{math.ceil(round(value * 1000, 6)) / 1000:g}"


def _asked(point: SweepPoint) -> Replies:
    if point.replies is None:
        raise EvaluationError(f"alpha {point.alpha:g} was not asked: {point.unasked}")
    return point.replies


def _cost(point: SweepPoint, base: SweepPoint, config: SweepConfig) -> float:
    return cost_of(point, base, config).value


def _account(point: SweepPoint, base: SweepPoint, config: SweepConfig) -> str:
    tokens, harm = _asked(point).harm
    where = "" if tokens == FREE else f" after a prefill of {tokens} token{'s' if tokens > 1 else ''}"
    return f"harm {_percent(harm.value)}{where}, {_cost_words(point, base, config)}"


def _cost_words(point: SweepPoint, base: SweepPoint, config: SweepConfig) -> str:
    assert point.perplexity is not None
    cost = cost_of(point, base, config)
    return (
        f"perplexity x{point.perplexity.value:.3f}, utility cost {cost.value:.2f} of the budget, most of it "
        f"{cost.bound_by}"
    )


def _gentlest(points: Sequence[SweepPoint], base: SweepPoint, config: SweepConfig) -> str:
    measured = [point for point in points if point.perplexities]
    if not measured:
        return "the weights broke at each"
    gentlest = min(measured, key=lambda point: (_cost(point, base, config), point.alpha))
    gibberish = "" if gentlest.replies is None else f", gibberish {_percent(gentlest.replies.gibberish.value)}"
    return f"the gentlest is {gentlest.alpha:g}: {_cost_words(gentlest, base, config)}{gibberish}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
