"""What an evaluation writes down, one row per reply or answer; nothing else is measured from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, TypeVar

from sku.config.evaluate import PrefillSource

HarmfulSplit = Literal["forget_train", "forget_test"]
Kind = Literal["reply", "prefill", "sample"]

HARMFUL_SPLITS: tuple[HarmfulSplit, ...] = ("forget_train", "forget_test")
"""Prompts of the forget set: asked with prefills and for sampled replies too."""
NORMAL, HARMFUL = "normal:", "harmful:"
"""What the splits of other sources begin with."""
BORDERLINE = "borderline"
"""Category of safe prompts that look harmful, in data of ``sku data own`` (``category_column: source``)."""
_KNOWN_SPLITS = frozenset({
    *HARMFUL_SPLITS, "retain_test", "xstest_safe", "xstest_unsafe", "forget_validation", "retain_validation",
})  # fmt: skip


def is_split(name: object) -> bool:
    """Whether there is a split of that name, those of other sources by what they begin with."""
    return name in _KNOWN_SPLITS or str(name).startswith((NORMAL, "normal_validation:", HARMFUL))


_IN_IDS: Mapping[str, str] = {"forget_train": "unlearned", "forget_test": "unseen"}
"""An id decides the random numbers of a sampled reply: it keeps the names that splits had when figures were
recorded."""

Split = Annotated[str, is_split]
"""``forget_train``, ``forget_test``, ``retain_test``, ``xstest_safe``, ``xstest_unsafe``, a validation split, or of
another source ``normal:NAME``, ``normal_validation:NAME``, ``harmful:NAME``; what a row of a file is held to."""


class _NormalSplits(Container[Split]):
    """Splits whose prompts deserve an answer, those of other sources by what they begin with."""

    def __contains__(self, split: object) -> bool:
        fixed = ("retain_test", "xstest_safe", "retain_validation")
        return split in fixed or str(split).startswith((NORMAL, "normal_validation:"))


NORMAL_SPLITS: Container[Split] = _NormalSplits()
"""Prompts that deserve an answer. The replies to all others are judged."""


def in_order(splits: Iterable[Split]) -> list[Split]:
    """Splits as tables show them: harmful prompts first, sets of other sources after the run's own, no split twice."""
    known = ("forget_train", "forget_test", HARMFUL, "retain_test", NORMAL, "xstest_safe", "xstest_unsafe")

    def place(split: Split) -> int:
        return next((number for number, name in enumerate(known) if split.startswith(name)), len(known))

    return sorted(dict.fromkeys(splits), key=place)


def set_name(split: Split) -> str:
    """The name that the recipe gives a set of another source."""
    return split.rpartition(":")[2]


def answers_words(split: Split) -> str:
    """What a reader calls the scored answers of a normal split."""
    return {"retain_test": "normal answers", "xstest_safe": "XSTest answers"}.get(split, f"{set_name(split)} answers")


class _OfSplit(Protocol):
    @property
    def split(self) -> Split: ...


Row = TypeVar("Row")
Key = TypeVar("Key", bound=Hashable)
RowOfSplit = TypeVar("RowOfSplit", bound=_OfSplit)


def grouped(rows: Iterable[Row], key: Callable[[Row], Key]) -> dict[Key, list[Row]]:
    """Rows that share a key, in the order in which keys and rows come."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def by_split(rows: Iterable[RowOfSplit]) -> dict[Split, list[RowOfSplit]]:
    """The rows of each split, in the order of ``in_order``."""
    groups = grouped(rows, lambda row: row.split)
    return {split: groups[split] for split in in_order(groups)}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One prompt, and what its reply was made to begin with."""

    id: str
    """Split, kind (with a prefill's key or a sample's number) and a hash of the prompt: equal for two models that were
    asked the same, so they can be paired."""
    split: Split
    kind: Kind
    """``reply``: the model answers freely and greedily; ``prefill``: it goes on from ``prefill``; ``sample``: it
    answers freely, and its words are sampled."""
    category: str | None
    prompt: str
    reference: str
    """The answer of the dataset."""
    prefill: str = ""
    """First words of a harmful reply that the model was made to begin with; empty for the other kinds."""
    prefill_key: str = ""
    """Whose words ``prefill`` is and how many (``prefill_key``); empty for the other kinds."""


@dataclass(frozen=True, kw_only=True)
class GenerationRecord(Asked):
    """One prompt and what the model said."""

    reply: str
    """The model's own words; under ``prefill`` they follow ``prefill`` character for character."""
    num_tokens: int
    """Generated tokens without the one that ends the reply."""
    finished: bool
    """Whether the model ended the reply itself, or was cut off."""
    sample: int = 0
    """Which of the sampled replies to this prompt, from 0; 0 for the other kinds."""

    @property
    def whole_reply(self) -> str:
        """The reply with the start that it was made to begin with, as it would be read."""
        return self.prefill + self.reply


@dataclass(frozen=True, kw_only=True)
class Start:
    """A reply of the base model that others are made from.

    The harmful one whose first tokens prefills take, or that to a normal prompt that has no answer, which is then
    scored.
    """

    id: str
    """Split and hash of the prompt."""
    text: str


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
    """What the base model thinks of one reply and of the same words in other orders, after prompt and prefill."""

    id: str
    nll: float
    """Sum over the tokens of the reply alone, nats."""
    tokens: int
    """Tokens of the reply."""
    shuffled_nlls: tuple[float, ...]
    """The same sum for each shuffled version that was asked; none where the own order is likely enough by itself."""


@dataclass(frozen=True, kw_only=True)
class AgreementRow:
    """The evaluated model beside the base model on one fixed answer of the dataset."""

    id: str
    """As of the answer's ``ExampleLoss``."""
    split: Split
    kl: float
    """``KL(base || model)``, sum over the answer's tokens, nats."""
    matches: int
    """Tokens at which both models put the same token first."""
    tokens: int


SIMILARITIES = ("rouge_l", "learned")
"""Metrics, the fields of a ``SimilarityRow``."""


@dataclass(frozen=True, kw_only=True)
class SimilarityRow:
    """One reply to a normal prompt against the answers that the dataset has for it, the best of them counted.

    A gibberish reply has 0, or its own score where that is lower.
    """

    id: str
    """Of the generation record."""
    rouge_l: float
    learned: float | None


AFFIRMATIVE = "affirmative"
_ANSWER = "answer/"


def prefill_key(source: PrefillSource, tokens: int) -> str:
    """Name of a prefill in records and results.

    Args:
        source: Whose words the reply is made to begin with: the base model's ``own`` harmful reply, an ``affirmative``
            beginning, or the dataset's ``answer``.
        tokens: How many; not read for an affirmative beginning, which is given whole.

    Returns:
        ``20``, ``affirmative``, ``answer/20``.
    """
    return {"own": str(tokens), "affirmative": AFFIRMATIVE, "answer": f"{_ANSWER}{tokens}"}[source]


def read_prefill_key(key: str) -> tuple[PrefillSource, int]:
    """The inverse of ``prefill_key``; 0 tokens for an affirmative beginning."""
    if key == AFFIRMATIVE:
        return "affirmative", 0
    return ("answer", int(key.removeprefix(_ANSWER))) if key.startswith(_ANSWER) else ("own", int(key))


def prefills_in_order(keys: Iterable[str]) -> list[str]:
    """Keys of prefills as tables show them: the base model's own words, the shortest first, affirmative, answers."""
    sources = ("own", "affirmative", "answer")

    def place(key: str) -> tuple[int, int]:
        source, tokens = read_prefill_key(key)
        return sources.index(source), tokens

    return sorted(set(keys), key=place)


def record_id(split: Split, kind: Kind, prompt: str, number: int | str = 0) -> str:
    """Name of a prompt in the records: says nothing of its words, and is the same for every model.

    Args:
        split: Of the prompt.
        kind: Of the reply.
        prompt: The user's words.
        number: Which sample, or the key of a prefill; not read for a free reply.

    Returns:
        Such as ``unseen-prefill3-0123456789abcdef``.
    """
    return f"{_IN_IDS.get(split, split)}-{kind if kind == 'reply' else f'{kind}{number}'}-{_hash(prompt)}"


def start_id(split: Split, prompt: str) -> str:
    """Name of the base model's reply that prefills of a prompt are cut from."""
    return f"{_IN_IDS.get(split, split)}-start-{_hash(prompt)}"


def prompt_hash(identifier: str) -> str:
    """The part of a record's id that all replies to one prompt share."""
    return identifier.rpartition("-")[2]


def _hash(prompt: str) -> str:
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]
