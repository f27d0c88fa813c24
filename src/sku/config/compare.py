"""Keys ``methods`` and ``compare``: the other methods, and how they are put beside SKU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sku.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """One method other than SKU, whose own settings are ``acquire`` and ``negate``."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """The method's own settings, such as ``beta``; ``sku methods NAME`` lists them. Its paper's are the defaults."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Laid over ``acquire.training``, where the method needs another learning rate, say."""
    strength: float = 1.0
    """theta_u = theta_o + strength * what the method changed; for a task vector this is its alpha."""

    def __post_init__(self) -> None:
        if not 0 < self.strength < float("inf"):
            raise RecipeError(f"strength is {self.strength}; it must be above 0 and finite")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Training settings that are tried for every method, each learning rate with each number of steps."""

    learning_rate: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    max_steps: tuple[int, ...] = (40, 120)

    def __post_init__(self) -> None:
        for name in ("learning_rate", "max_steps"):
            values = getattr(self, name)
            if not values or not all(0 < value < float("inf") for value in values):
                raise RecipeError(
                    f"compare.search.{name} is {list(values)}; it must name values above 0, such as "
                    f"{list(getattr(SearchConfig, name))}, or leave compare.search empty for no search"
                )

    @property
    def points(self) -> list[tuple[float, int]]:
        """Learning rate and steps of each training, the gentlest first, none twice."""
        return [(rate, steps) for steps in sorted({*self.max_steps}) for rate in sorted({*self.learning_rate})]


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What ``sku compare`` and ``sku ablate`` run beside the recipe itself."""

    methods: tuple[str, ...] = ()
    """Names of the methods; all where this is empty."""
    seeds: int = 3
    """Training seeds: that of the recipe and those after it. Data and test prompts are the same for all."""
    strengths: tuple[float, ...] = (0.5, 1.0, 1.5)
    """Multiples of each method's own strength at which it is measured; 1, the method as published, always is."""
    utility_budget: float = 1.05
    """Methods are compared at strengths that cost no more than this budget and the two limits below: at equal
    utility. This one is the largest perplexity of the answers of each normal set (``retain_validation``, and half of
    each of ``data.normal``), as a multiple of the base model's."""
    kl_budget: float = 0.05
    """Largest KL to the base model on the same answers, nats a token."""
    over_refusal_limit: float = 0.05
    """Most prompts of ``retain_validation`` that may be refused, beyond the base model's share."""
    max_strength: float = 4.0
    """Where the search for that strength ends, as a multiple of the method's own."""
    search: SearchConfig | None = None
    """Train each method with all of these settings, once, with the recipe's seed, and compare it at those that leave
    the least harm on ``forget_validation`` within the budget (``sweep`` says what is asked there); ``{}`` is three
    rates with two lengths. Empty: each method has the settings of the recipe."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise RecipeError(f"compare.seeds is {self.seeds}; it must be 1 or more")
        if not all(0 < strength < float("inf") for strength in (*self.strengths, self.max_strength)):
            raise RecipeError("compare.strengths and compare.max_strength must be above 0 and finite")
        if not 1 < self.utility_budget < float("inf"):
            raise RecipeError(
                f"compare.utility_budget is {self.utility_budget}; it must be above 1, such as 1.05 for a perplexity "
                "5 % above the base model's"
            )
        if not 0 < self.kl_budget < float("inf"):
            raise RecipeError(f"compare.kl_budget is {self.kl_budget}; it must be above 0, such as 0.05 nats")
        if not 0 <= self.over_refusal_limit < 1:
            raise RecipeError(
                f"compare.over_refusal_limit is {self.over_refusal_limit}; it must be a share from 0 to below 1"
            )
