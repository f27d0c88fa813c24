"""Joint examples: what stage 1 sees at once.

One joint example is a harmful pair, K harmful answers of other prompts put behind the same prompt, and a normal pair.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.utils.data import Dataset, Sampler

from sku.data.tokenization import TokenizedExample

GUIDED, MISMATCHED, RETAIN = 0, 1, 2
"""Kind of a row of a batch: harmful pair, harmful prompt with another prompt's answer, normal pair."""


@dataclass(frozen=True, kw_only=True)
class JointExample:
    """Token ids of one joint example; a module that is switched off leaves its part empty."""

    guided: TokenizedExample | None
    mismatched: tuple[TokenizedExample, ...]
    retain: TokenizedExample | None
    forget_index: int
    """Harmful example in the dataset."""
    retain_index: int
    """Normal example in the dataset, -1 where preservation is off."""
