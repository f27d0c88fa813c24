"""The only two shapes of data that cross into the rest of the package, and the splits of them."""

from __future__ import annotations

import dataclasses
import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from typing import Literal, TypeVar, final

from sku.errors import DataError


@final
@dataclass(frozen=True, kw_only=True)
class ForgetExample:
    """A harmful prompt with a harmful answer to it."""

    prompt: str
    answer: str
    category: str | None = None
    group: str | None = None
    """Examples of one group are never split apart; the normalised prompt where this is None."""
    safe_answer: str | None = None
    """A good answer to the same prompt, where the data has one (``data.refusals``, or its own column); trained on by
    SKU's good twin, and by preference and refusal tuning."""
    finished: bool = True
    """Whether the answer came to its end, or was cut off: one that was cut teaches no end."""
    safe_answer_finished: bool = True
    """The same of the safe answer."""


@final
@dataclass(frozen=True, kw_only=True)
class RetainExample:
    """A normal prompt with a good answer to it."""

    prompt: str
    answer: str
    category: str | None = None
    group: str | None = None
    """Examples of one group are never split apart; the normalised prompt where this is None."""
    finished: bool = True
    """Whether the answer came to its end, or was cut off: one that was cut teaches no end."""
    refusal: str | None = None
    """A refusal that doesn't belong here (``data.misplaced_refusals``); trained on by
    ``acquire.preservation_mode: targeted`` only."""


Example = ForgetExample | RetainExample
E = TypeVar("E", ForgetExample, RetainExample)
RetainTokens = Literal["answer", "all"]
FEW_PROMPTS = 50
"""Of a split with fewer: with 50 prompts the 95 % interval of a share is still up to 27 points wide."""


class RowType(IntEnum):
    """What a row of a batch is; mismatched: a harmful prompt with another prompt's answer."""

    FORGET = 0
    MISMATCHED = 1
    RETAIN = 2
    SAFE = 3


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """Which rows a method trains on."""

    forget: bool = False
    """The harmful pair."""
    mismatched: int = 0
    """K, answers of other prompts after each harmful prompt."""
    mismatched_from: Literal["forget", "retain"] = "forget"
    """Whose answers these are: harmful ones, or normal ones."""
    retain: int = 0
    """Normal pairs of each joint example."""
    retain_refused: bool = False
    """The normal prompts stand before their misplaced refusals, in place of their answers."""
    retain_tokens: RetainTokens = "answer"
    """Positions of the normal pair that count: those before the tokens of its answer, or those before all its
    tokens."""
    safe: Literal["none", "data", "data or refusal", "all"] = "none"
    """A safe answer after the harmful prompt. ``data`` trains only on prompts for which the data has one; ``data or
    refusal`` takes one of ``data.joint.REFUSALS`` where it has none; ``all`` wants one for each, so that the examples
    and their order are those of a method without safe answers."""
    deep_refusal_fraction: float = 0.0
    """Share of the safe answers that stand after the beginning of the harmful answer, where it is broken off."""
    depth_tokens: int = 0
    """Most tokens of that beginning."""
    framed_share: float = 0.0
    """Share of the harmful and of the normal examples whose prompt stands in a framing."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where examples came from, as recorded in the manifest."""

    source: str
    """Name of the loader: ``pku_saferlhf``, ``truthfulqa``, ..."""
    location: str
    """Path or hub id."""
    revision: str | None = None
    """Commit of a hub dataset."""
    sha256: str = ""
    """Hash over all prompts and answers in order (``content_hash``)."""
    rows_read: int = 0
    rows_left_out: dict[str, int] = field(default_factory=dict)
    """Reason -> how often it left a prompt and answer out: nothing is dropped uncounted. A row with two answers can
    count twice."""
    licence: str | None = None
    """As the recipe says (``data.*.license``), else that of a known hub dataset; None where neither tells it."""

    def keeping(self, kept: Sequence[Example], left_out: int, reason: str) -> Provenance:
        """The same after some more were left out for one reason."""
        if not left_out:
            return self
        reasons = {**self.rows_left_out, reason: left_out}
        return dataclasses.replace(self, sha256=content_hash(kept), rows_left_out=reasons)


@dataclass(frozen=True, kw_only=True)
class ForgetRetainData:
    """Splits of one run. No normalised prompt, and no group, is in two splits of the same kind, or in both kinds.

    The sets of other sources (``normal``, ``harmful``) share no prompt with the others either.
    """

    forget_train: tuple[ForgetExample, ...] = ()
    """Harmful pairs that stage 1 trains on."""
    forget_test: tuple[ForgetExample, ...] = ()
    """Harmful pairs held out: the method never sees these prompts."""
    retain_train: tuple[RetainExample, ...] = ()
    retain_validation: tuple[RetainExample, ...] = ()
    retain_test: tuple[RetainExample, ...] = ()
    provenance: tuple[Provenance, ...] = ()
    normal: Mapping[str, tuple[RetainExample, ...]] = field(default_factory=dict)
    """Name -> normal prompts of another source, never trained on; the answers of a set are empty where it has none."""
    normal_validation: Mapping[str, tuple[RetainExample, ...]] = field(default_factory=dict)
    """Name -> the other half of a set with answers, that strengths are chosen by and that is not reported."""
    harmful: Mapping[str, tuple[ForgetExample, ...]] = field(default_factory=dict)
    """Name -> harmful prompts of another source, without answers, never trained on; one may be in several of these."""
    forget_validation: tuple[ForgetExample, ...] = ()
    """Harmful pairs to choose settings by, alpha above all: neither trained on nor tested. Empty where none is
    chosen."""
    visited: tuple[int, ...] | None = None
    """Places among ``forget_train`` that training visits: in so many steps it rarely meets all. None where that isn't
    known."""

    def __post_init__(self) -> None:
        apart = {name: examples for name, examples in self.splits().items() if not name.startswith("harmful:")}
        check_disjoint({**apart, "harmful": [example for found in self.harmful.values() for example in found]})

    def notes(self) -> tuple[str, ...]:
        """Sentences that a reader of any figure on these splits needs; none for large splits by prompt."""
        prompts = {name: prompts_of(found) for name, found in self.splits().items()}
        listed = ", ".join(f"{name} {len(found)}" for name, found in prompts.items() if 0 < len(found) < FEW_PROMPTS)
        note = (
            f"few prompts: {listed}; with fewer than about {FEW_PROMPTS} in a split there is little to learn from it, "
            "and its figures say little"
        )
        return (note,) if listed else ()

    def trained_on(self) -> tuple[ForgetExample, ...]:
        """The harmful examples that training visits; all of ``unlearned`` where it isn't known, or it visits none."""
        return tuple(self.forget_train[place] for place in self.visited) if self.visited else self.forget_train

    def count_trained(self, examples: Sequence[Example]) -> int | None:
        """How many of some harmful examples have a prompt that training visits; None where that isn't known."""
        if self.visited is None:
            return None
        prompts = prompts_of(self.forget_train[place] for place in self.visited)
        return sum(normalise_prompt(example.prompt) in prompts for example in examples)

    def splits(self) -> dict[str, Sequence[Example]]:
        """Examples of each split, by name; ``forget_validation`` only where there is one.

        Sets of other sources are called ``normal:NAME``, ``normal_validation:NAME`` and ``harmful:NAME``.
        """
        names = ["forget_train", "forget_test", "retain_train", "retain_validation", "retain_test"]
        names += ["forget_validation"] if self.forget_validation else []
        found: dict[str, Sequence[Example]] = {name: getattr(self, name) for name in names}
        for kind in ("normal", "normal_validation", "harmful"):
            found |= {f"{kind}:{name}": examples for name, examples in getattr(self, kind).items()}
        return found

    def counts(self) -> dict[str, int]:
        """Number of examples in each split of ``splits``, by name."""
        return {name: len(examples) for name, examples in self.splits().items()}


@lru_cache(maxsize=65_536)  # Loading, splitting and asking each want it of the same prompts.
def normalise_prompt(prompt: str) -> str:
    """The form in which two prompts are compared: Unicode NFKC, case folded, punctuation and spacing collapsed.

    A prompt of punctuation or symbols alone keeps them, so that two such prompts stay different.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", prompt).casefold())
    # Vowel signs of Devanagari, Thai and others are marks, which \W would drop: they are part of the word.
    letters = "".join(
        character if character.isalnum() or unicodedata.category(character)[0] == "M" else " " for character in text
    )
    return " ".join(letters.split()) or " ".join(text.split())


def prompts_of(examples: Iterable[Example]) -> set[str]:
    """Their different prompts, normalised."""
    return {normalise_prompt(example.prompt) for example in examples}


def is_valid_unicode(text: str) -> bool:
    """Whether text can be written as UTF-8, which a lone surrogate can't; no tokenizer takes one."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def has_answers(examples: Sequence[Example]) -> bool:
    """Whether a set has answers, or holds prompts alone."""
    return any(example.answer for example in examples)


def group_of(example: Example) -> str:
    """The key that keeps an example's relatives in its split."""
    return example.group if example.group is not None else normalise_prompt(example.prompt)


def check_disjoint(splits: dict[str, Sequence[Example]]) -> None:
    """Refuses splits that share a prompt or a group.

    Raises:
        DataError: With the two split names and the number of prompts they share.
    """
    owner: dict[tuple[str, str], str] = {}
    shared: dict[tuple[str, str], int] = {}
    for name, examples in splits.items():
        keys = {("prompt", prompt) for prompt in prompts_of(examples)}
        keys |= {("group", example.group) for example in examples if example.group is not None}
        for key in keys:
            first = owner.setdefault(key, name)
            if first != name:
                shared[first, name] = shared.get((first, name), 0) + 1
    if shared:
        (first, second), count = max(shared.items(), key=lambda item: item[1])
        raise DataError(
            f"splits {first} and {second} share {count} prompts or groups: a held-out prompt must not be trained on. "
            "Remove the overlap or let SKU make the splits."
        )


def content_hash(examples: Iterable[Example]) -> str:
    """SHA-256 over prompts and answers in order, so that a run can say which data it saw without showing it.

    That an answer was cut off is part of it.
    """
    digest = hashlib.sha256()
    for example in examples:
        for text in (example.prompt, example.answer):
            encoded = text.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "big"))
            digest.update(encoded)
        if not example.finished:
            digest.update(b"\xff" * 8)  # No length that a text has.
    return digest.hexdigest()
