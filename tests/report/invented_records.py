"""Records of comparisons that never ran."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sku.config import CompareConfig
from sku.evaluate.utility_cost import Utility, utility_cost
from sku.report.method_records import NORMAL_KEY, MethodRecord, Point, is_harmful_key

BUDGET = 1.05
METHODS = (
    "sku", "gradient_ascent", "gradient_difference", "npo", "simnpo", "dpo", "idk_tuning", "task_vector", "rmu",
    "undial", "whp", "flat",
)  # fmt: skip
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


def make_point(
    replies: str = "",
    *,
    prefill: str = "",
    normal: str = "",
    judged: str | None = None,
    exact: str | None = None,
    losses: Mapping[str, Iterable[float]] | None = None,
    strength: float = 1.0,
    roles: Sequence[str] = ("published",),
    ratio: float | None = None,
) -> Point:
    """A point from letters: ``replies`` and ``prefill`` of unseen harmful prompts, ``normal`` of normal ones."""
    outcomes = {"forget_test/reply": replies, "forget_test/prefill/5": prefill, NORMAL_KEY: normal}
    outcomes = {key: letters for key, letters in outcomes.items() if letters}
    own = {
        key: "".join("1" if letter == "h" else "0" for letter in outcomes[key])
        for key in outcomes
        if is_harmful_key(key)
    }
    return Point(
        strength=strength,
        roles=tuple(roles),
        utility=None if ratio is None else spent(ratio),
        outcomes=outcomes,
        judged=own if judged is None else {**own, "forget_test/reply": judged},
        exact="-" * len(normal) if exact is None else exact,
        losses={split: tuple(map(float, row)) for split, row in (losses or {}).items()},
    )


def spent(ratio: float) -> Utility:
    """What a perplexity ratio costs where nothing else is lost."""
    limits = CompareConfig(utility_budget=BUDGET)
    perplexity, kl = {"retain_validation": ratio}, {"retain_validation": 0.0}
    cost = utility_cost(limits, perplexity=perplexity, kl=kl)
    return Utility(perplexity=perplexity, kl=kl, over_refusal=None, cost=cost)


def make_record(name: str, *points: Point, seed: int = 0, **changes: Any) -> MethodRecord:
    """A complete record that was asked what its first point answers; every fixed answer has 10 tokens."""
    first = points[0] if points else None
    plain: dict[str, Any] = {
        "name": name, "title": name.replace("_", " "), "method": name, "paper_url": "https://arxiv.org/abs/2402.10058",
        "control": False, "seed": seed, "status": "complete", "failure": None, "key": "0" * 64,
        "recipe": {"seed": seed, "compare": {"utility_budget": BUDGET}}, "environment": {"torch": "2.13"},
        "data": {"rows": 4}, "training": {"steps": 3},
        "asked": dict.fromkeys(first.outcomes, "f" * 64) if first else {},
        "tokens": {split: (10,) * len(row) for split, row in first.losses.items()} if first else {},
        "points": points, "judge": {"name": "refusal_rules", "version": "1"},
    }  # fmt: skip
    return MethodRecord(**{**plain, **changes})


def failed_record(name: str, seed: int, failure: str) -> MethodRecord:
    return make_record(name, seed=seed, status="failed", failure=failure)


def invented_comparison(methods: Sequence[str] = METHODS, *, seeds: int = 3, prompts: int = 60) -> list[MethodRecord]:
    """Methods that lose harm and utility at different speeds, and four controls."""
    rng = np.random.default_rng(7)
    base_losses = rng.gamma(4, 3, size=prompts)

    def point(reply: float, prefilled: float, rise: float | None, strength: float, *roles: str) -> Point:
        def letters(share: float, hit: str, others: str) -> str:
            drawn = rng.choice(list(others), size=prompts)
            return "".join(np.where(rng.random(prompts) < share, hit, drawn))

        noise = rng.normal(0, 0.3, size=prompts)
        losses = {} if rise is None else {"retain_test": base_losses + 10 * rise + (noise if rise else 0)}
        if losses:
            losses["forget_test"] = base_losses + 10 * (1 - reply)
        return make_point(
            letters(reply, "h", "rred"), prefill=letters(prefilled, "h", "rred"), normal=letters(0.95, "a", "od"),
            exact=_exact(rng, prompts, rise or 0.0),
            losses=losses, strength=strength, roles=roles, ratio=None if rise is None else math.exp(rise),
        )  # fmt: skip

    records = []
    for index, name in enumerate(methods):
        speed, cost = 0.6 + 0.25 * index, 0.02 * 1.5**index
        for seed in range(seeds):
            points = [
                point(
                    0.96 * math.exp(-speed * 2 * strength), 0.98 * math.exp(-speed * strength), cost * strength**2,
                    strength, "sweep", *(["published"] if strength == 1 else []),
                )
                for strength in STRENGTHS
            ]  # fmt: skip
            matched = math.sqrt(0.045 / cost)
            points.append(
                point(
                    0.96 * math.exp(-speed * 2 * matched), 0.98 * math.exp(-speed * matched), 0.045, matched, "matched"
                )
            )
            records.append(make_record(name, *points, seed=seed))
    controls = {
        "base": (0.96, 0.98, 0.0), "random_direction": (0.94, 0.97, 0.03), "always_refuse": (0.0, 0.0, None),
        "always_gibberish": (0.0, 0.0, None),
    }  # fmt: skip
    return records + [
        make_record(name, point(*shares, 1.0, "published"), control=True) for name, shares in controls.items()
    ]


def _exact(rng: np.random.Generator, prompts: int, rise: float) -> str:
    """Every third reference is too long to compare; the rest is right less often the higher the loss rose."""
    right = rng.random(prompts) < 0.9 * math.exp(-3 * rise)
    return "".join("-" if number % 3 == 0 else str(int(hit)) for number, hit in enumerate(right))
