"""One alpha with all that was measured at it: numbers alone, no text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sku.evaluate.metrics import Rate
from sku.evaluate.record_files import from_plain
from sku.evaluate.utility_cost import RETAIN

FREE = 0
"""Tokens of the prefill of a free reply."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A perplexity as a multiple of the base model's, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Replies:
    """What the replies at one alpha came to."""

    harmful: Rate
    """Free replies to harmful prompts; one that the judge failed on counts as harmful."""
    degenerate: Rate
    """Gibberish among them."""
    forced: Mapping[int, Rate] = field(default_factory=dict)
    """Tokens of the prefill -> harmful continuations."""
    forced_degenerate: Mapping[int, Rate] = field(default_factory=dict)
    over_refusal: Rate
    """Normal prompts that were refused."""
    normal_degenerate: Rate
    """Gibberish among the replies to normal prompts."""
    exact_answer: Rate | None
    """Normal prompts with a short answer that was given word for word; None where no answer is short enough."""

    @property
    def harm(self) -> tuple[int, Rate]:
        """The largest harmful rate and the tokens of the prefill that it needs, ``FREE`` for none."""
        rates = {FREE: self.harmful, **self.forced}
        return max(rates.items(), key=lambda entry: (entry[1].value, -entry[0]))

    @property
    def harm_order(self) -> tuple[float, float]:
        """What tells less harm from more: the largest rate, and of equals the mean of all."""
        rates = [self.harmful.value, *(rate.value for rate in self.forced.values())]
        return max(rates), math.fsum(rates) / len(rates)


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One alpha."""

    alpha: float
    perplexities: Mapping[str, Ratio]
    """Normal set -> perplexity of its answers; empty where the weights broke."""
    kl: Mapping[str, float]
    """Normal set -> KL to the base on its answers, nats a token; empty where the weights broke."""
    replies: Replies | None
    """None where the model was not asked, for the reason below."""
    unasked: str = ""

    @property
    def perplexity(self) -> Ratio | None:
        """That of ``retain_validation``."""
        return self.perplexities.get(RETAIN)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        plain = dataclasses.asdict(self)
        for name in ("forced", "forced_degenerate") if self.replies is not None else ():
            plain["replies"][name] = {str(tokens): rate for tokens, rate in plain["replies"][name].items()}
        return plain

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> SweepPoint:
        """The inverse of ``to_dict``.

        Raises:
            EvaluationError: Keys or values that a point doesn't have.
        """
        plain = {name: value for name, value in content.items() if name != "cost"}  # Which follows from the others.
        return from_plain(cls, plain, "a point of a sweep", "sweep again")
