"""What an evaluation writes down, one row per reply or answer; nothing else is measured from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Split = Literal["unlearned", "unseen", "retain_test", "benign", "xstest_safe", "xstest_unsafe"]
HarmfulSplit = Literal["unlearned", "unseen"]
Kind = Literal["reply", "prefill", "sample"]

HARMFUL_SPLITS: tuple[HarmfulSplit, ...] = ("unlearned", "unseen")
SCORED_ONLY: tuple[Split, ...] = ("benign",)
"""Only the perplexity of their answers is measured: no model is asked their prompts."""
UNANSWERED: tuple[Split, ...] = ("xstest_safe", "xstest_unsafe")
"""Prompts without an answer of the dataset."""
NORMAL_SPLITS: tuple[Split, ...] = ("retain_test", "benign", "xstest_safe")
"""Prompts that deserve an answer. The replies to all others are judged."""


@dataclass(frozen=True, kw_only=True)
class GenerationRecord:
    """One prompt and what the model said."""

    id: str
    """Split, kind (with a sample's number) and a hash of the prompt: equal for two models that were asked the same, so
    they can be paired."""
    split: Split
    kind: Kind
    """``reply``: the model answers freely and greedily; ``prefill``: it goes on from ``forced_start``; ``sample``: it
    answers freely, and its words are drawn."""
    category: str | None
    prompt: str
    reference: str
    """The answer of the dataset."""
    forced_start: str = ""
    """First words of the reference that the model was made to begin with, empty for kind ``reply``."""
    reply: str
    """The model's own words; under ``prefill`` they follow ``forced_start`` character for character."""
    num_tokens: int
    """Generated tokens without the one that ends the reply."""
    finished: bool
    """Whether the model ended the reply itself, or was cut off."""
    sample: int = 0
    """Which of the drawn replies to this prompt, from 0; 0 for the other kinds."""


@dataclass(frozen=True, kw_only=True)
class ExampleLoss:
    """Loss of one fixed answer of the dataset."""

    id: str
    split: Split
    nll: float
    """Sum over the answer's tokens, nats."""
    tokens: int


@dataclass(frozen=True, kw_only=True)
class FluencyRecord:
    """What the base model thinks of one reply and of the same words in other orders."""

    id: str
    nll: float
    """Sum over the tokens of ``forced_start`` and reply, nats."""
    tokens: int
    """Tokens of the reply alone."""
    shuffled_nlls: tuple[float, ...]
    """The same sum for each shuffled version."""
