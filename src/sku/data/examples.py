"""The only two shapes of data that cross into the rest of the package, the splits of them, and how these are made.

What belongs together stays together, and the same seed gives the same split anywhere: groups are ordered by a hash of
seed and name, so a split depends neither on the order of the rows nor on Python's random generators, and a few more
rows change it little.
"""

from __future__ import annotations

import dataclasses
import hashlib
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from typing import Literal, TypeVar, final

from sku.data.near_copies import families
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
    safe_answers: int = 0
    """Forget examples that have a safe answer."""
    licence: str | None = None
    """As the recipe says (``data.*.license``), else that of a known hub dataset; None where neither tells it."""

    def keeping(self, kept: Sequence[Example], left_out: int, reason: str) -> Provenance:
        """The same after some more were left out for one reason."""
        if not left_out:
            return self
        return dataclasses.replace(
            self,
            sha256=content_hash(kept),
            rows_left_out={**self.rows_left_out, reason: left_out},
            safe_answers=count_safe_answers(kept),
        )


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
        counts = {
            name: len({normalise_prompt(example.prompt) for example in examples})
            for name, examples in self.splits().items()
        }
        listed = ", ".join(f"{name} {count}" for name, count in counts.items() if 0 < count < FEW_PROMPTS)
        if not listed:
            return ()
        note = (
            f"few prompts: {listed}; with fewer than about {FEW_PROMPTS} in a split there is little to learn from it, "
            "and its figures say little"
        )
        return (note,)

    def trained_on(self) -> tuple[ForgetExample, ...]:
        """The harmful examples that training visits; all of ``unlearned`` where it isn't known, or it visits none."""
        return tuple(self.forget_train[place] for place in self.visited) if self.visited else self.forget_train

    def count_trained(self, examples: Sequence[Example]) -> int | None:
        """How many of some harmful examples have a prompt that training visits; None where that isn't known."""
        if self.visited is None:
            return None
        prompts = {normalise_prompt(self.forget_train[place].prompt) for place in self.visited}
        return sum(normalise_prompt(example.prompt) in prompts for example in examples)

    def answered(self) -> ForgetRetainData:
        """The same without the sets of which only replies tell: harmful prompts of other sources, prompts alone."""
        normal = {name: examples for name, examples in self.normal.items() if has_answers(examples)}
        return dataclasses.replace(self, normal=normal, harmful={})

    def splits(self) -> dict[str, Sequence[Example]]:
        """Examples of each split, by name; ``forget_validation`` only where there is one.

        Sets of other sources are called ``normal:NAME``, ``normal_validation:NAME`` and ``harmful:NAME``.
        """
        found: dict[str, Sequence[Example]] = {
            "forget_train": self.forget_train,
            "forget_test": self.forget_test,
            "retain_train": self.retain_train,
            "retain_validation": self.retain_validation,
            "retain_test": self.retain_test,
        }
        if self.forget_validation:
            found["forget_validation"] = self.forget_validation
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
        keys = {("prompt", normalise_prompt(example.prompt)) for example in examples}
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


def count_safe_answers(examples: Iterable[Example]) -> int:
    """Number of forget examples that have a safe answer."""
    return sum(isinstance(example, ForgetExample) and example.safe_answer is not None for example in examples)


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


@dataclass(frozen=True)
class _Group:
    """Examples that share a prompt, its near copies or a named group, directly or over others."""

    name: str
    category: str
    members: tuple[int, ...]


def split_by_group(
    examples: Sequence[E],
    *,
    rest: str,
    held_out: Mapping[str, float],
    seed: int,
    what: str = "the data",
    near_copies: bool = True,
) -> dict[str, tuple[E, ...]]:
    """Holds out whole groups: no normalised prompt, no family of near copies and no named group is in two splits.

    Every category (that of a group's first example) gives each split its share, as near as whole groups allow.

    Args:
        examples: All examples.
        rest: Name of the split that gets what no other gets.
        held_out: Name of each other split -> share of the groups, at least one group.
        seed: Another seed holds out other groups.
        what: Name of the data, for the error.
        near_copies: Whether near copies stay together (``data/near_copies.py``); not where all prompts are one form,
            as the embedded world's.

    Returns:
        Split name -> its examples, in their order in ``examples``.

    Raises:
        DataError: There are fewer groups than splits.
    """
    groups = _groups(examples, near_copies)
    counts = {name: max(1, round(share * len(groups))) for name, share in held_out.items()}
    if sum(counts.values()) >= len(groups):
        raise DataError(
            f"{what} has {len(groups)} different prompts or groups, too few for the splits "
            f"{', '.join([rest, *held_out])} with shares "
            f"{', '.join(f'{name} {share:g}' for name, share in held_out.items())}: add data or lower the shares"
        )
    remaining = sorted(groups, key=lambda group: (group.category, _rank(seed, "split", group.name)))
    chosen: dict[str, list[_Group]] = {}
    for name, count in counts.items():
        chosen[name], remaining = _take_evenly(remaining, count)
    chosen[rest] = remaining
    splits = {}
    for name in (rest, *held_out):
        indices = sorted(index for group in chosen[name] for index in group.members)
        splits[name] = tuple(examples[index] for index in indices)
    return splits


def draw_prompts(examples: Sequence[E], limit: int | None, seed: int) -> list[E]:
    """Keeps ``limit`` different prompts with all their answers, in their order; all where there are no more.

    A higher limit keeps the same prompts and more.
    """
    if limit is None:
        return list(examples)
    prompts = [normalise_prompt(example.prompt) for example in examples]
    kept = set(sorted(set(prompts), key=lambda prompt: _rank(seed, "limit", prompt))[:limit])
    return [example for example, prompt in zip(examples, prompts, strict=True) if prompt in kept]


def limited(examples: Sequence[E], provenance: Provenance, limit: int | None, seed: int) -> tuple[list[E], Provenance]:
    """``draw_prompts`` of what a source gave, with the account of it."""
    kept = draw_prompts(examples, limit, seed)
    return kept, provenance.keeping(kept, len(examples) - len(kept), "over the limit")


def _groups(examples: Sequence[E], near_copies: bool) -> list[_Group]:
    """Connected components of "same normalised prompt, near copy or same group"."""
    parent = list(range(len(examples)))

    def find(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    prompts = [normalise_prompt(example.prompt) for example in examples]
    different = list(dict.fromkeys(prompts))
    numbers = families(different) if near_copies else range(len(different))
    family = dict(zip(different, map(str, numbers), strict=True))
    first: dict[tuple[str, str], int] = {}
    for index, example in enumerate(examples):
        keys = [("family", family[prompts[index]])]
        keys += [("group", example.group)] if example.group is not None else []
        for key in keys:
            one, other = find(index), find(first.setdefault(key, index))
            parent[max(one, other)] = min(one, other)
    members: dict[int, list[int]] = defaultdict(list)
    for index in range(len(examples)):
        members[find(index)].append(index)
    return [
        _Group(min(prompts[index] for index in indices), examples[indices[0]].category or "", tuple(indices))
        for indices in members.values()
    ]


def _take_evenly(groups: list[_Group], count: int) -> tuple[list[_Group], list[_Group]]:
    """Takes ``count`` groups at even distances, so that each stretch of the list gives its share."""
    taken: list[_Group] = []
    left: list[_Group] = []
    for position, group in enumerate(groups):
        is_taken = (position + 1) * count // len(groups) > position * count // len(groups)
        (taken if is_taken else left).append(group)
    return taken, left


def _rank(seed: int, purpose: str, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{purpose}\0{name}".encode("utf-8", "surrogatepass")).digest()
