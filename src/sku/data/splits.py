"""Splits by prompt: what belongs together stays together, and the same seed gives the same split anywhere.

Groups are ordered by a hash of seed and name, so a split depends neither on the order of the rows nor on Python's
random generators, and a few more rows change it little.

Prompts that differ by a few words ask the same thing: a held-out one of them is not unseen. Two prompts are near
copies where the cosine of their TF-IDF vectors over character 3- to 5-grams within words is at least ``NEAR``. A
family is a connected component of near copies. A family with more than ``LARGEST_SHARE`` of the prompts is a way to
ask rather than a thing to ask ("write a tutorial on how to ..."); its members are linked again at the next of
``STRICTER``. So of fewer than 40 prompts equal ones alone are a family.

Measured on the 1,337 harmful prompts of five sources with a fifth held out (docs/your_data.md): 13 % of the held-out
ones have a trained neighbour above .9 by the cosine of MiniLM's embeddings where equal text alone is kept together,
0.7 % where families are; above .8 it is 32 and 14 %.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from sku.data.examples import E, Provenance, normalise_prompt
from sku.errors import DataError

NEAR = 0.5
STRICTER = (0.6, 0.7, 0.85)
LARGEST_SHARE = 0.05
_ROWS_AT_ONCE = 256
"""Of the matrix of similarities: it is never held whole."""


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
        near_copies: Whether near copies stay together; not where all prompts are one form, as the embedded world's.

    Returns:
        Split name -> its examples, in their order in ``examples``.

    Raises:
        DataError: There are fewer groups than splits.
    """
    remaining = _groups(examples, near_copies, seed)
    counts = {name: max(1, round(share * len(remaining))) for name, share in held_out.items()}
    if sum(counts.values()) >= len(remaining):
        raise DataError(
            f"{what} has {len(remaining)} different prompts or groups, too few for {rest} and the shares "
            f"{', '.join(f'{name} {share:g}' for name, share in held_out.items())}: add data or lower the shares"
        )
    chosen: dict[str, list[list[int]]] = {rest: []}
    for name, count in counts.items():
        # At even distances, so that each stretch of the list gives its share.
        size = len(remaining)
        taken = {place for place in range(size) if (place + 1) * count // size > place * count // size}
        chosen[name] = [remaining[place] for place in sorted(taken)]
        remaining = [group for place, group in enumerate(remaining) if place not in taken]
    chosen[rest] = remaining
    return {
        name: tuple(examples[index] for index in sorted(index for group in groups for index in group))
        for name, groups in chosen.items()
    }


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


def _groups(examples: Sequence[E], near_copies: bool, seed: int) -> list[list[int]]:
    """Connected components of "same normalised prompt, near copy or same group", by category and hash."""
    if not examples:
        return []
    prompts = [normalise_prompt(example.prompt) for example in examples]
    different = tuple(dict.fromkeys(prompts))
    family = dict(zip(different, families(different) if near_copies else range(len(different)), strict=True))
    first: dict[object, int] = {}
    links = [(index, first.setdefault(family[prompt], index)) for index, prompt in enumerate(prompts)]
    links += [
        (index, first.setdefault(example.group, index))
        for index, example in enumerate(examples)
        if example.group is not None
    ]
    members: dict[int, list[int]] = defaultdict(list)
    for index, component in enumerate(_components(len(examples), *np.array(links).T)):
        members[component].append(index)

    def place(group: list[int]) -> tuple[str, bytes]:
        return examples[group[0]].category or "", _rank(seed, "split", min(prompts[index] for index in group))

    return sorted(members.values(), key=place)


def _components(size: int, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Number of the connected component of each of ``size`` things, which pairs of them link."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    links = coo_matrix((np.ones(len(one)), (one, other)), shape=(size, size))
    found: np.ndarray = connected_components(links, directed=False)[1]
    return found


def _rank(seed: int, purpose: str, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{purpose}\0{name}".encode("utf-8", "surrogatepass")).digest()


@lru_cache(maxsize=8)  # A run reads its data more than once.
def families(prompts: tuple[str, ...]) -> tuple[int, ...]:
    """The family of each prompt.

    Args:
        prompts: Different and normalised. 4,000 take 3 s on one core, and the time grows with the square.

    Returns:
        A number a prompt, equal for near copies; the same prompts in another order make the same families.
    """
    if len(prompts) < 2:
        return (0,) * len(prompts)
    vectors = _vectors(prompts)
    rows, columns, cosines = _near_pairs(vectors, vectors)
    largest = max(1, int(LARGEST_SHARE * len(prompts)))
    found: np.ndarray = np.arange(len(prompts))
    kept = np.ones(len(rows), dtype=bool)
    for cosine in (NEAR, *STRICTER, np.inf):
        kept &= cosines >= cosine
        found = _components(len(prompts), rows[kept], columns[kept])
        too_large = np.bincount(found)[found] > largest
        if not too_large.any():
            break
        # Families that are small enough stay as they are; the next, stricter cosine is for the others alone.
        cosines = np.where(too_large[rows], cosines, np.where(kept, np.inf, cosines))
    return tuple(found.tolist())


@lru_cache(maxsize=8)  # A run reads its data more than once.
def near_to(prompts: tuple[str, ...], others: tuple[str, ...]) -> tuple[bool, ...]:
    """Whether each prompt is a near copy of one of the others; all normalised."""
    if not prompts or not others:
        return (False,) * len(prompts)
    vectors = _vectors((*prompts, *others))
    rows, _, _ = _near_pairs(vectors[: len(prompts)], vectors[len(prompts) :])
    near = np.zeros(len(prompts), dtype=bool)
    near[rows] = True
    return tuple(near.tolist())


def _vectors(prompts: tuple[str, ...]) -> Any:
    """Unit vectors, one a row of a sparse matrix, so that a product of two is a cosine."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    grams = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, dtype=np.float32)
    return grams.fit_transform(prompts)


def _near_pairs(first: Any, second: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row of the one, row of the other, and their cosine, where that is at least ``NEAR``."""
    pairs = []
    for start in range(0, first.shape[0], _ROWS_AT_ONCE):
        cosines = (first[start : start + _ROWS_AT_ONCE] @ second.T).tocoo()
        near = cosines.data >= NEAR
        pairs.append((cosines.row[near] + start, cosines.col[near], cosines.data[near].astype(np.float64)))
    rows, columns, cosines = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    return rows, columns, cosines
