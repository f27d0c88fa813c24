"""Prompts that differ by a few words ask the same thing: a held-out one of them is not unseen.

Two prompts are near copies where the cosine of their TF-IDF vectors over character 3- to 5-grams within words is at
least ``NEAR``. A family is a connected component of near copies. A family with more than ``LARGEST_SHARE`` of the
prompts is a way to ask rather than a thing to ask ("write a tutorial on how to ..."); its members are linked again at
the next of ``STRICTER``. So of fewer than 40 prompts equal ones alone are a family.

Measured on the 1,337 harmful prompts of five sources with a fifth held out (docs/your_data.md): 13 % of the held-out
ones have a trained neighbour above .9 by the cosine of MiniLM's embeddings where equal text alone is kept together,
0.7 % where families are; above .8 it is 32 and 14 %.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

NEAR = 0.5
STRICTER = (0.6, 0.7, 0.85)
LARGEST_SHARE = 0.05
_ROWS_AT_ONCE = 256
"""Of the matrix of similarities: it is never held whole."""


def families(prompts: Sequence[str]) -> list[int]:
    """The family of each prompt.

    Args:
        prompts: Different and normalised. 4,000 take 3 s on one core, and the time grows with the square.

    Returns:
        A number a prompt, equal for near copies; the same prompts in another order make the same families.
    """
    return list(_families(tuple(prompts)))


@lru_cache(maxsize=8)
def _families(prompts: tuple[str, ...]) -> tuple[int, ...]:
    """As ``families``; a run reads its data more than once."""
    if len(prompts) < 2:
        return (0,) * len(prompts)
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    vectors = _vectors(prompts)
    rows, columns, cosines = _near_pairs(vectors, vectors, NEAR)
    largest = max(1, int(LARGEST_SHARE * len(prompts)))
    found = np.arange(len(prompts))
    kept = np.ones(len(rows), dtype=bool)
    for cosine in (NEAR, *STRICTER, np.inf):
        kept &= cosines >= cosine
        links = coo_matrix((cosines[kept], (rows[kept], columns[kept])), shape=(len(prompts),) * 2)
        _, found = connected_components(links, directed=False)
        sizes = np.bincount(found)
        too_large = sizes[found] > largest
        if not too_large.any():
            break
        # Families that are small enough stay as they are; the next, stricter cosine is for the others alone.
        cosines = np.where(too_large[rows], cosines, np.where(kept, np.inf, cosines))
    return tuple(int(number) for number in found)


def near_to(prompts: Sequence[str], others: Sequence[str]) -> list[bool]:
    """Whether each prompt is a near copy of one of the others.

    Args:
        prompts: Normalised.
        others: Normalised.
    """
    return list(_near_to(tuple(prompts), tuple(others)))


@lru_cache(maxsize=8)
def _near_to(prompts: tuple[str, ...], others: tuple[str, ...]) -> tuple[bool, ...]:
    """As ``near_to``; a run reads its data more than once."""
    if not prompts or not others:
        return (False,) * len(prompts)
    vectors = _vectors([*prompts, *others])
    rows, _, _ = _near_pairs(vectors[: len(prompts)], vectors[len(prompts) :], NEAR)
    near = np.zeros(len(prompts), dtype=bool)
    near[rows] = True
    return tuple(near.tolist())


def count_near_copies(prompts: Sequence[str]) -> int:
    """Prompts that have a near copy among the others, by the families above.

    Args:
        prompts: Different and normalised.
    """
    return sum(count for count in Counter(families(prompts)).values() if count > 1)


def _vectors(prompts: Sequence[str]) -> csr_matrix:
    """Unit vectors, one a row, so that a product of two is a cosine."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    grams = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, dtype=np.float32)
    return grams.fit_transform(prompts)


def _near_pairs(first: csr_matrix, second: csr_matrix, least: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row of the one, row of the other, and their cosine, where that is at least ``least``."""
    pairs = []
    for start in range(0, first.shape[0], _ROWS_AT_ONCE):
        cosines = (first[start : start + _ROWS_AT_ONCE] @ second.T).tocoo()
        near = cosines.data >= least
        pairs.append((cosines.row[near] + start, cosines.col[near], cosines.data[near].astype(np.float64)))
    rows, columns, cosines = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    return rows, columns, cosines
