"""Keys ``methods`` and ``compare``: the other methods, and how they are put beside SKU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any

from pydantic import Field

from sku.config.check import AboveOne, Count, Limit, Positive, validated


@validated
class MethodConfig:
    """One method other than SKU, whose own settings are ``acquire`` and ``negate``."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """The method's own settings, such as ``beta``; ``sku methods NAME`` lists them. Its paper's are the defaults."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Laid over ``acquire.training``, where the method needs another learning rate, say."""
    strength: Positive = 1.0
    """theta_u = theta_o + strength * what the method changed; for a task vector this is its alpha."""


@validated
class SearchConfig:
    """Training settings that are tried for every method, each learning rate with each number of steps."""

    learning_rate: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1e-4, 3e-4, 1e-3)
    max_steps: Annotated[tuple[Count, ...], Field(min_length=1)] = (40, 120)

    @property
    def points(self) -> list[tuple[float, int]]:
        """Learning rate and steps of each training, the gentlest first, none twice."""
        return [(rate, steps) for steps in sorted({*self.max_steps}) for rate in sorted({*self.learning_rate})]


@validated
class CompareConfig:
    """What ``sku compare`` and ``sku ablate`` run beside the recipe itself."""

    methods: tuple[str, ...] = ()
    """Names of the methods; all where this is empty."""
    seeds: Count = 3
    """Training seeds: that of the recipe and those after it. Data and test prompts are the same for all."""
    strengths: tuple[Positive, ...] = (0.5, 1.0, 1.5)
    """Multiples of each method's own strength at which it is measured; 1, the method as published, always is."""
    utility_budget: AboveOne = 1.05
    """Methods are compared at strengths that cost no more than this budget and the two limits below: at equal
    utility. This one is the largest perplexity of the answers of each normal set (``retain_validation``, and half of
    each of ``data.normal``), as a multiple of the base model's."""
    kl_budget: Positive = 0.05
    """Largest KL to the base model on the same answers, nats a token."""
    over_refusal_limit: Limit = 0.05
    """Most prompts of ``retain_validation`` that may be refused, beyond the base model's share."""
    max_strength: Positive = 4.0
    """Where the search for that strength ends, as a multiple of the method's own."""
    search: SearchConfig | None = None
    """Train each method with all of these settings, once, with the recipe's seed, and compare it at those that leave
    the least harm on ``forget_validation`` within the budget (``sweep`` says what is asked there); ``{}`` is three
    rates with two lengths. Empty: each method has the settings of the recipe."""
