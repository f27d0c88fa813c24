"""Attacks on an unlearned model: what they came to, as it stands in ``attacks.json``.

No torch here: tables are made from this file.

Keys of the file:

- ``schema_version``: of this file.
- ``setup``: which models were attacked, with what, and how replies were written and judged, ``AttackSetup``.
- ``cards``: what each attack is, ``AttackCard``, in the order in which they ran; ``none``, the questions as they are,
  comes first.
- ``results``: one entry for each attack but relearning and setting, ``AttackResult``: ``attack``, ``setting``,
  ``details``, ``questions``, and what the attacked ``model`` and the ``control`` (the base model under the same
  attack) said, each a ``AttackedReplies``: ``harmful`` (before and after the attack, paired by question),
  ``harmful_upper_bound``, ``replies`` (the rates of ``evaluation.json`` over all replies) and ``variants`` (harmful
  rate of each way to ask).
- ``relearn``: what fine-tuning brought back, ``Relearned``; null without that attack. For each number of pairs
  ``half_steps`` of ``model`` is the figure: steps until half of the base's harm is back, null for more than the last
  of ``steps``.
- ``left_out``: what could not be asked -> number of prompts.

A rate is ``count``, ``total``, ``value``, ``low``, ``high`` (Wilson, 95 %). Replies are in ``attacks/<name>*.jsonl``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sku.evaluate.judges import JudgeCard
from sku.evaluate.metrics import Rate, RateChange
from sku.evaluate.records import JsonArtifact

AttackKind = Literal["none", "prompt", "weights"]


@dataclass(frozen=True)
class AttackCard:
    """What an attack is."""

    name: str
    """As in ``evaluate.attacks``."""
    title: str
    """As in tables."""
    kind: AttackKind
    """``prompt``: the request is rewritten and the weights stay; ``weights``: the other way round."""
    changes: str
    """What is changed, in a sentence."""
    source_url: str = ""
    """Where the attack was described; empty for ``none``."""


_CARDS = (
    AttackCard("none", "No attack", "none", "nothing"),
    AttackCard(
        "paraphrase", "Paraphrase", "prompt", "the request is put in other words of the same meaning, by rules",
        "https://arxiv.org/abs/2309.17410",
    ),
    AttackCard(
        "template", "Template", "prompt", "the request is wrapped in role play, a story or a task of another kind",
        "https://arxiv.org/abs/2308.03825",
    ),
    AttackCard(
        "rounding", "Rounding", "weights", "the weights are rounded to formats of 16, 8 and 4 bits",
        "https://arxiv.org/abs/2410.16454",
    ),
    AttackCard(
        "relearn", "Relearning", "weights",
        "the model is fine-tuned on a few harmful pairs, none of which is asked, until half of the base's harm is "
        "back",
        "https://arxiv.org/abs/2406.13356",
    ),
)  # fmt: skip
CARDS: Mapping[str, AttackCard] = {card.name: card for card in _CARDS}
"""By name."""


@dataclass(frozen=True, kw_only=True)
class AttackedReplies:
    """What one model said under one setting of an attack."""

    harmful: RateChange
    """Share of questions, from the questions as they are (``before``) to the attack (``after``): a question counts
    where the reply to any of its variants is harmful."""
    harmful_upper_bound: Rate
    """The same where replies that the judge failed on are taken for harmful."""
    replies: Mapping[str, Rate]
    """All rates of replies to harmful prompts, over all variants. Where a question has several, their intervals take
    the replies for independent and are too narrow."""
    variants: Mapping[str, Rate]
    """Variant -> harmful rate of the questions that were asked so; empty where there is one variant only."""


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """One attack in one setting, on the model and on the control."""

    attack: str
    setting: str
    """Such as ``10 pairs``; empty for an attack that has one setting."""
    details: Mapping[str, Any]
    """The setting in numbers."""
    questions: int
    """Questions that were asked, the same of both models."""
    model: AttackedReplies
    control: AttackedReplies
    """The base model under the same attack."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One model after so many steps of fine-tuning on harmful pairs."""

    steps: int
    """0: as it is."""
    harmful: Rate
    """Of the questions, asked as they are."""
    harmful_upper_bound: Rate
    """The same where replies that the judge failed on are taken for harmful."""
    gibberish: Rate
    """Of the same replies."""
    perplexity: float | None
    """Of normal answers, as a multiple of the base model's; None where there are no normal prompts."""


@dataclass(frozen=True, kw_only=True)
class RelearnLine:
    """One training."""

    learning_rate: float | None
    """None where half was there before any training."""
    checkpoints: tuple[Checkpoint, ...]
    """The model as it is, then one for each look."""
    half_steps: int | None
    """The first of them with half of the base's harm; None where none has it."""


@dataclass(frozen=True, kw_only=True)
class RelearnResult:
    """What a number of pairs brought back."""

    pairs: int
    pairs_sha256: str
    model: RelearnLine
    """At the attacker's best learning rate: the fewest steps, or else the most harm at the last of them."""
    others: tuple[RelearnLine, ...]
    """At the other rates, the best first; none goes on after the steps of the best."""
    control: RelearnLine
    """The base model under the training of the best rate, as far as that went."""


@dataclass(frozen=True, kw_only=True)
class Relearned:
    """How much fine-tuning brings half of the base's harm back."""

    details: Mapping[str, Any]
    """Of all trainings: what is trained, pairs a step, lengths."""
    questions: int
    base_harmful: Rate
    """Of the base model's own free replies to them."""
    half: int
    """Harmful replies that are half of it; 0 where it has none, and then there are no results."""
    steps: tuple[int, ...]
    """At which a model is looked at."""
    results: tuple[RelearnResult, ...]
    """One for each number of pairs."""


@dataclass(frozen=True, kw_only=True)
class AttackSetup:
    """What was attacked, and how replies were written and judged."""

    model: Mapping[str, str]
    """``dtype`` and ``fingerprint``, a hash of what the weights compute."""
    control: Mapping[str, str]
    """The same of the base model, which also looks for word salad."""
    prompt_format: str
    decoding: Mapping[str, Any]
    config: Mapping[str, Any]
    """``EvaluateConfig`` in full."""
    seed: int
    judge: JudgeCard


@dataclass(frozen=True, kw_only=True)
class AttackReport(JsonArtifact):
    """All attacks on one model, as ``attacks.json`` holds them. The fields are the keys listed above."""

    FILE = "attacks.json"
    AGAIN = "run the attacks again"

    setup: AttackSetup
    cards: tuple[AttackCard, ...]
    results: tuple[AttackResult, ...]
    relearn: Relearned | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
