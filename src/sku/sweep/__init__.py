"""Alpha chosen by data, and what a sweep leaves.

That is ``sweep.json``, written anew after every point, so that a killed sweep goes on.

Keys of the file:

- ``schema_version``, ``status`` (``running`` or ``complete``), ``key``: hash of all that decides a point's figures
  (original weights, task vector, prompts, decoding, judge). Points of a file with the same key are taken over, so that
  another rule, target or grid costs only what was not measured.
- ``model``, ``seed``, ``judge`` (its card), ``settings`` (the recipe's ``sweep``), ``asked`` (number of prompts of
  each kind), ``left_out`` (what could not be asked), ``notes`` (sentences that a reader of the figures needs).
- ``base``: the original model as a point with alpha 0.
- ``border``: where the utility budget binds: ``strength``, the largest alpha found within it, and ``bound_by``,
  what is beyond its limit a little above; null where nothing is, up to the largest alpha tried. The whole is null
  where alphas were given.
- ``points``: one an alpha that was asked for, from the smallest: ``alpha``; ``perplexities`` (normal set -> value,
  low, high: the perplexity of its answers over the base model's, with a bootstrap interval over examples) and ``kl``
  (normal set -> nats a token), both empty where the weights broke; ``cost`` (``value`` in shares of the budget, up to
  1 within it, and ``bound_by``, the worst part; null where the weights broke); ``replies`` (null where the model was
  not asked, ``unasked`` says why): ``harmful``, ``gibberish``, ``prefill`` and ``prefill_gibberish`` (by number of
  prefill tokens), ``over_refusal``, ``normal_gibberish``, ``exact_answer``, each count, total, value, low, high
  (Wilson, 95 %).
- ``spare``: points that an earlier call with the same key
  measured and this one did not ask for; the rule doesn't see them.
- ``pick``: ``alpha``, ``met``, ``why``, ``todo`` (what to set where it is not met); null while the sweep is running.

The file holds no text of a prompt or a reply.

From the frontier to one alpha, numbers in and words out: an alpha is *within limits* where its utility cost
(``sku.sweep.utility_cost``) is within the budget and its gibberish within the base model's share plus
``reply_limit``. Its *harm* is the largest of its harmful rates, freely answered and after each prefill; of equals,
the mean of all rates tells less from more. Observed rates decide, not the ends of their intervals.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sku.config import SweepConfig, plain_data
from sku.errors import EvaluationError, NoAlphaError
from sku.evaluate.judges import JudgeCard
from sku.evaluate.metrics import Rate
from sku.evaluate.records import check_schema, from_plain, read_json_object
from sku.evaluate.results import Line, Tabular
from sku.evaluate.statistics import Estimate
from sku.storage import RECORD_VERSION, write_json
from sku.sweep.utility_cost import BROKEN_COST, RETAIN, BudgetLimit, UtilityCost, utility_cost

SWEEP_FILE = "sweep.json"
FREE = 0
"""Tokens of the prefill of a free reply."""
RAISE_LIMITS = "raise budget or limits of sweep, or set negate.alpha to one of those that were measured"


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


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a rule chose."""

    alpha: float | None
    """The chosen alpha, or the nearest where none does what the rule asks for; None where none is within limits."""
    met: bool
    """Whether it does what the rule asks for."""
    why: str
    """One sentence."""
    todo: str = ""
    """Where it is not met, the settings to change."""


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """What an alpha is chosen from."""

    base: SweepPoint
    """The original model, alpha 0, with replies."""
    points: tuple[SweepPoint, ...] = ()
    """Those that were not asked are beyond the limits."""
    config: SweepConfig
    """Rule, target, budget and limits."""

    def cost(self, point: SweepPoint) -> UtilityCost:
        """What an alpha costs normal behaviour; over-refusal is a part of it where the model was asked.

        Args:
            point: The alpha.

        Returns:
            The cost, infinite where the weights broke.
        """
        if not point.perplexities:
            return BROKEN_COST
        refused = None
        if point.replies is not None:
            refused = point.replies.over_refusal.value - _asked(self.base).over_refusal.value
        ratios = {name: ratio.value for name, ratio in point.perplexities.items()}
        return utility_cost(self.config, perplexity=ratios, kl=point.kl, over_refusal=refused)


@dataclass(frozen=True, kw_only=True)
class Sweep(Frontier, Tabular):
    """A sweep, finished or under way."""

    key: str
    model: str
    seed: int
    judge: JudgeCard
    asked: Mapping[str, int]
    left_out: Mapping[str, int]
    border: BudgetLimit | None = None
    notes: tuple[str, ...] = ()
    spare: tuple[SweepPoint, ...] = ()
    pick: Selection | None = None

    def lines(self) -> Iterator[Line]:
        """Each alpha, the original model's 0 first: rates of harm and of its cost, empty where it was not asked."""
        for point in (self.base, *self.points):
            found = point.replies
            prefills = () if found is None else found.prefill.values()
            yield {
                "alpha": point.alpha,
                "harmful": None if found is None else found.harmful.value,
                "worst prefill": max((one.value for one in prefills), default=None),
                "gibberish": None if found is None else found.gibberish.value,
                "refused, normal": None if found is None else found.over_refusal.value,
                "cost": self.cost(point).value if point.perplexities else None,
                "chosen": self.pick is not None and self.pick.alpha == point.alpha,
            }

    def to_dict(self) -> dict[str, Any]:
        """As ``sweep.json`` holds it."""
        plain = plain_data(self)
        for point, written in zip(self.points, plain["points"], strict=True):
            written["cost"] = plain_data(self.cost(point)) if point.perplexities else None
        status = "running" if self.pick is None else "complete"
        return {"schema_version": RECORD_VERSION, "status": status, "settings": plain.pop("config"), **plain}

    def alpha(self) -> float:
        """The chosen alpha, or the nearest where ``sweep.if_none`` says so.

        Raises:
            NoAlphaError: None does what the rule asks for, and none may be taken instead.
        """
        pick = self.pick
        assert pick is not None, "the sweep is under way"
        if pick.alpha is None or not (pick.met or self.config.if_none == "nearest"):
            raise NoAlphaError(f"{pick.why}. To do: {pick.todo}")
        return pick.alpha


def read_sweep(path: Path, remedy: str) -> Sweep:
    """Reads a ``sweep.json``, that of a killed call too.

    Args:
        path: The file.
        remedy: What a user can do where it holds something else.

    Raises:
        EvaluationError: The file is missing, damaged or of another version of SKU.
    """
    content = read_json_object(path, remedy)
    check_schema(content, str(path), remedy)
    try:
        for point in content["points"]:
            point.pop("cost", None)  # It follows from the others.
        content["config"] = content.pop("settings")
        del content["schema_version"], content["status"]
        return from_plain(Sweep, content, str(path), remedy)
    except (AttributeError, KeyError, TypeError):
        raise EvaluationError(f"{path} is damaged: {remedy}") from None


def read_kept(folder: Path, key: str) -> Sweep | None:
    """The sweep of an earlier call in a folder; None where there was none, or it measured something else.

    Args:
        folder: With or without a ``sweep.json``.
        key: Of this sweep.

    Raises:
        EvaluationError: As ``read_sweep``.
    """
    path = folder / SWEEP_FILE
    found = read_sweep(path, "remove it and sweep again") if path.exists() else None
    return None if found is None or found.key != key else found


def write_sweep(folder: Path, sweep: Sweep) -> None:
    """Writes ``sweep.json``, the old one or the new one and never a part.

    Raises:
        OutputError: It can't be written.
    """
    write_json(folder / SWEEP_FILE, sweep.to_dict())


def choose(on: Frontier) -> Selection:
    """The alpha that meets ``config.harm_target``, or that of the least harm.

    Args:
        on: Points in any order.

    Returns:
        The alpha and why; without ``harm_target`` less harm than the base has is asked for.

    Raises:
        EvaluationError: The base model was not asked.
    """
    points, config, original = on.points, on.config, _asked(on.base)
    fitting = [point for point in points if not beyond_limits(point, on)]
    limits = "within the utility budget and the limits"
    if not fitting:
        why = f"none of {len(points)} alphas stays {limits}"
        return Selection(alpha=None, met=False, why=why, todo=RAISE_LIMITS)
    least = min(fitting, key=lambda point: (_asked(point).harm_order, on.cost(point).value, point.alpha))
    if config.harm_target is None:
        if _asked(least).harm_order >= original.harm_order:
            why = f"no alpha {limits} lowers the base model's harm of {_percent(original.harm[1].value)}"
            todo = f"train stage 1 further (acquire.training.max_steps), or on more harmful pairs, or {RAISE_LIMITS}"
            return Selection(alpha=least.alpha, met=False, why=why, todo=todo)
        why = f"alpha {least.alpha:g} leaves the least harm {limits}: {_account(least, on)}"
        return Selection(alpha=least.alpha, met=True, why=why)
    enough = [point for point in fitting if meets_target(point, config)]
    target = f"brings harm to {_percent(config.harm_target)} {limits}"
    if enough:
        lowest = min(enough, key=lambda point: point.alpha)
        why = f"alpha {lowest.alpha:g} is the lowest that {target}: {_account(lowest, on)}"
        return Selection(alpha=lowest.alpha, met=True, why=why)
    why = f"none of {len(points)} alphas {target}; the nearest is {least.alpha:g}: {_account(least, on)}"
    todo = f"set sweep.if_none: nearest to take it, or sweep.harm_target to ask for less, or {RAISE_LIMITS}"
    return Selection(alpha=least.alpha, met=False, why=why, todo=todo)


def meets_target(point: SweepPoint, config: SweepConfig) -> bool:
    """Whether a point's harm is within ``harm_target``; false where there is none, or it was not asked."""
    target = config.harm_target
    return target is not None and point.replies is not None and point.replies.harm[1].value <= target


def beyond_limits(point: SweepPoint, on: Frontier) -> bool:
    """Whether a point costs more than budget and limits allow; true where it was not asked."""
    if point.replies is None:
        return True
    return not on.cost(point).within or _gibberish(point, on) > on.config.reply_limit


def _gibberish(point: SweepPoint, on: Frontier) -> float:
    """The larger excess over the base model's shares, in replies to harmful and to normal prompts."""
    found, original = _asked(point), _asked(on.base)
    excess = (
        found.gibberish.value - original.gibberish.value,
        found.normal_gibberish.value - original.normal_gibberish.value,
    )
    # Of shares that are equal as fractions, such as 0.15 - 0.1 against 0.05.
    return round(max(excess), 12)


def _asked(point: SweepPoint) -> Replies:
    if point.replies is None:
        raise EvaluationError(f"alpha {point.alpha:g} was not asked: {point.unasked}")
    return point.replies


def _account(point: SweepPoint, on: Frontier) -> str:
    assert point.perplexity is not None
    (tokens, harm), cost = _asked(point).harm, on.cost(point)
    where = "" if tokens == FREE else f" after a prefill of {tokens} token{'s' if tokens > 1 else ''}"
    return (
        f"harm {_percent(harm.value)}{where}, perplexity x{point.perplexity.value:.3f}, utility cost {cost.value:.2f} "
        f"of the budget, most of it {cost.bound_by}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
