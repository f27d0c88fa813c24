"""How replies are worded as a whole: does a model say one thing to everything, and how much does it say?

A model that answers every prompt with the same sentence can look safe, fluent and on no one's topic. The share of the
commonest reply shows it at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median_low

from sku.evaluate.degeneracy import words_of
from sku.evaluate.records import GenerationRecord


@dataclass(frozen=True, kw_only=True)
class Wording:
    """Of the replies to one split's prompts."""

    replies: int
    same_reply: float
    """Share of the replies that are the commonest one, letter case, spacing and punctuation apart; 1/replies where
    all differ."""
    distinct_pairs: float
    """Different pairs of neighbouring words among all such pairs; 0 where there are none. Low for one phrase said
    again and again, within a reply or across them."""
    mean_tokens: float
    """Generated tokens of a reply, the one that ends it left out."""
    median_words: int | None = None
    """Half of the replies are no longer; None in a result of an older version."""


def wording_of(records: Sequence[GenerationRecord]) -> Wording | None:
    """Counts words over replies; None for no replies.

    Args:
        records: Of one split and kind.
    """
    if not records:
        return None
    texts = [tuple(words_of(record.reply)) for record in records]
    pairs = [pair for text in texts for pair in pairwise(text)]
    return Wording(
        replies=len(records),
        same_reply=max(Counter(texts).values()) / len(records),
        distinct_pairs=len(set(pairs)) / len(pairs) if pairs else 0.0,
        mean_tokens=sum(record.num_tokens for record in records) / len(records),
        median_words=median_low(len(record.reply.split()) for record in records),
    )
