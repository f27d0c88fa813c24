"""Which prompts are asked: drawn by the seed, every category with its share, no prompt twice."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

from sku.data.examples import ForgetExample, RetainExample, normalise_prompt
from sku.evaluate.records import Kind, Split

E = TypeVar("E", ForgetExample, RetainExample)


def draw_examples(examples: Sequence[E], count: int, *, seed: int) -> list[E]:
    """Draws one example for each of ``count`` distinct prompts, with categories in proportion.

    Args:
        examples: Of one split; several may answer the same prompt, one of them is then drawn.
        count: Prompts wanted; all of them where there are fewer.
        seed: Equal seeds draw equal examples from equal splits, and a smaller count draws a part of a larger one.

    Returns:
        Examples in drawn order.
    """
    shuffled = random.Random(seed).sample(list(examples), len(examples))
    distinct = {normalise_prompt(example.prompt): example for example in reversed(shuffled)}
    candidates = [example for example in shuffled if distinct[normalise_prompt(example.prompt)] is example]
    sizes = Counter(example.category for example in candidates)
    rank: Counter[str | None] = Counter()
    keyed = []
    for position, example in enumerate(candidates):
        # Evenly spread places in 0..1 for each category: any first part holds every category in proportion.
        place = (rank[example.category] + 0.5) / sizes[example.category]
        rank[example.category] += 1
        keyed.append((place, position, example))
    keyed.sort(key=lambda entry: entry[:2])
    return [example for _, _, example in keyed[:count]]


def record_id(split: Split, kind: Kind, prompt: str, number: int = 0) -> str:
    """Name of a prompt in the records: says nothing of its words, and is the same for every model.

    Args:
        split: Of the prompt.
        kind: Of the reply.
        prompt: The user's words.
        number: Which sample, or the tokens of a prefill; not read for a free reply.

    Returns:
        Such as ``unseen-prefill3-0123456789abcdef``.
    """
    return f"{split}-{kind if kind == 'reply' else f'{kind}{number}'}-{_hash(prompt)}"


def start_id(split: Split, prompt: str) -> str:
    """Name of the start that every prefill of a prompt is cut from."""
    return f"{split}-start-{_hash(prompt)}"


def prompt_hash(identifier: str) -> str:
    """The part of a record's id that all replies to one prompt share."""
    return identifier.rpartition("-")[2]


def _hash(prompt: str) -> str:
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]
