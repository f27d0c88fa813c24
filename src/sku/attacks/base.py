"""The one interface of all attacks.

There are two kinds. An attack on the prompt rewrites the request and leaves the weights; an attack on the weights
changes a copy of the model and asks the questions as they are. Each has one setting or more (a length, a number of
pairs). Whatever is done to the unlearned model is done to the base model too: without that control a rise could come
from the attack alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.attacks.results import AttackCard
from sku.config import Recipe
from sku.data.examples import ForgetExample, ForgetRetainData
from sku.evaluate.batching import StageProgress


@dataclass(frozen=True, kw_only=True)
class AttackContext:
    """What an attack may know when it lays out its settings."""

    recipe: Recipe
    """``evaluate`` has the attacks' settings, ``acquire`` those of training."""
    data: ForgetRetainData
    model: PreTrainedModel
    """The model to attack, for its shape alone."""
    tokenizer: PreTrainedTokenizerBase
    progress: StageProgress | None = None


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to ask a question."""

    prompt: str
    name: str = ""
    """Equal for all questions asked this way; empty where there is one way only."""
    prefill_tokens: int = 0
    """Tokens of a harmful reply that the reply is made to begin with."""


def as_it_is(example: ForgetExample) -> tuple[Variant]:
    """The question unchanged."""
    return (Variant(prompt=example.prompt),)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One strength of an attack: on the prompt it rewrites, on the weights it changes."""

    name: str = ""
    """As in tables; empty where the attack has one setting."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """The setting as plain data, recorded. Equal details must give equal replies: finished ones are then reused."""
    rewrite: Callable[[ForgetExample], Iterable[Variant | str]] = as_it_is
    """All ways to ask one question; for each that can't be asked, why."""
    change: Callable[[PreTrainedModel], AbstractContextManager[PreTrainedModel | PeftModel]] = nullcontext
    """Gives a changed copy, which is gone when the block ends. The model itself is not changed."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """An attack. One file defines one or two, and ``sku.attacks.run.ATTACKS`` lists them."""

    card: AttackCard
    settings: Callable[[AttackContext], Sequence[Setting]]
    """All strengths that are tried."""
