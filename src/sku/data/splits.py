"""Splits by prompt: what belongs together stays together, and the same seed gives the same split anywhere.

Groups are ordered by a hash of seed and name, so a split depends neither on the order of the rows nor on Python's
random generators, and a few more rows change it little.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from sku.data.examples import ForgetExample, Provenance, RetainExample, normalise_prompt
from sku.errors import DataError

E = TypeVar("E", ForgetExample, RetainExample)


@dataclass(frozen=True)
class _Group:
    """Examples that share a prompt or a named group, directly or over others."""

    name: str
    category: str
    members: tuple[int, ...]


def split_by_group(
    examples: Sequence[E], *, rest: str, held_out: Mapping[str, float], seed: int, what: str = "the data"
) -> dict[str, tuple[E, ...]]:
    """Holds out whole groups: no normalised prompt and no named group is in two splits.

    Every category (that of a group's first example) gives each split its share, as near as whole groups allow.

    Args:
        examples: All examples.
        rest: Name of the split that gets what no other gets.
        held_out: Name of each other split -> share of the groups, at least one group.
        seed: Another seed holds out other groups.
        what: Name of the data, for the error.

    Returns:
        Split name -> its examples, in their order in ``examples``.

    Raises:
        DataError: There are fewer groups than splits.
    """
    groups = _groups(examples)
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


def draw_rows(examples: Sequence[E], share: float, seed: int) -> tuple[E, ...]:
    """Draws a share of the rows, whatever prompt they have: other answers to a drawn prompt may be left out."""
    ranks = [_rank(seed, "row", f"{example.prompt}\0{example.answer}") for example in examples]
    drawn = sorted(range(len(examples)), key=ranks.__getitem__)[: int(share * len(examples))]
    return tuple(examples[index] for index in sorted(drawn))


def _groups(examples: Sequence[E]) -> list[_Group]:
    """Connected components of "same normalised prompt or same group"."""
    parent = list(range(len(examples)))

    def find(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    prompts = [normalise_prompt(example.prompt) for example in examples]
    first: dict[tuple[str, str], int] = {}
    for index, example in enumerate(examples):
        keys = [("prompt", prompts[index])] + ([("group", example.group)] if example.group is not None else [])
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
