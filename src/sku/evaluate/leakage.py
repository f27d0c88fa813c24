"""leak@k: how likely at least one of k drawn replies to a prompt is harmful, averaged over prompts.

A greedy reply is one word chain out of many; what a model still says in one draw of eight is not unlearned.
Sources: the estimator of pass@k, Chen et al. 2021 (arXiv:2107.03374); for unlearning, arXiv:2511.04934.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sku.evaluate.metrics import HARMFUL_PROMPT_RATES, Rate, rates_of
from sku.evaluate.outcomes import ReplyOutcome
from sku.evaluate.sampling import prompt_hash
from sku.evaluate.statistics import clustered_bootstrap, leak_at_k, leak_at_k_interval, wilson_interval

_SEED = 0
"""Of the bootstraps of one model's own rates."""


@dataclass(frozen=True, kw_only=True)
class Leak:
    """leak@k over the prompts of one split, with its 95 % interval.

    The interval is a bootstrap over prompts; where every prompt says the same, nothing or everything, that would have
    no width, and it is the Wilson interval of as many prompts.
    """

    value: float
    low: float
    high: float


def leaks_of(replies: Sequence[ReplyOutcome]) -> dict[str, Leak]:
    """leak@k of one split's drawn replies for k = 1, 2, 4, ... and the number drawn.

    Args:
        replies: Of kind ``sample``.

    Returns:
        k as a word -> leak; empty for no replies.
    """
    if not replies:
        return {}
    harmful, drawn = (list(counts.values()) for counts in counts_per_prompt(replies))
    leaks = {}
    for k in numbers_of_draws(min(drawn)):
        low, high = leak_at_k_interval(harmful, drawn, k, seed=_SEED)
        leaks[str(k)] = Leak(value=leak_at_k(harmful, drawn, k), low=low, high=high)
    return leaks


def sample_rates(replies: Sequence[ReplyOutcome]) -> dict[str, Rate]:
    """The rates of drawn replies; their intervals are over prompts, as replies to one prompt are not independent.

    Args:
        replies: Of kind ``sample``, of one split.

    Returns:
        As ``rates_of``.
    """
    prompts = [prompt_hash(reply.id) for reply in replies]
    rates = {}
    for name, found in rates_of(replies).items():
        hits = [HARMFUL_PROMPT_RATES[name](reply) for reply in replies]
        if found.count in (0, found.total):
            number = len(set(prompts))
            low, high = wilson_interval(number if found.count else 0, number)
        else:
            low, high = clustered_bootstrap(hits, [1] * len(hits), clusters=prompts, statistic=np.divide, seed=_SEED)
        rates[name] = dataclasses.replace(found, low=low, high=high)
    return rates


def leaks_per_prompt(replies: Sequence[ReplyOutcome], k: int) -> dict[str, float]:
    """Hash of the prompt -> its own leak@k."""
    harmful, drawn = counts_per_prompt(replies)
    return {prompt: leak_at_k([harmful[prompt]], [drawn[prompt]], k) for prompt in drawn}


def counts_per_prompt(replies: Sequence[ReplyOutcome]) -> tuple[dict[str, int], dict[str, int]]:
    """Harmful and drawn replies of each prompt, by the hash in their ids."""
    harmful: dict[str, int] = {}
    drawn: dict[str, int] = {}
    for reply in replies:
        prompt = prompt_hash(reply.id)
        harmful[prompt] = harmful.get(prompt, 0) + (reply.outcome == "harmful")
        drawn[prompt] = drawn.get(prompt, 0) + 1
    return harmful, drawn


def numbers_of_draws(most: int) -> list[int]:
    """1, 2, 4, ... below ``most``, and ``most`` itself."""
    return [*(2**power for power in range(most.bit_length()) if 2**power < most), most]
