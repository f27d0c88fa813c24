"""``scaling * B A``, block by block of rows.

A product of the whole and one of some rows need not agree in the last bit: libraries multiply a single row with
another routine. Both ways of negating an adapter therefore multiply the same blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2 * 2**20
"""Elements of a tensor that are held in memory together, and at which a new seed of stochastic rounding begins."""


def block_rows(columns: int) -> int:
    """Rows of a matrix that make up one block; at least one."""
    return max(1, BLOCK_ELEMENTS // max(1, columns))


def low_rank_rows(upper: Tensor, lower: Tensor, scaling: float, start: int, stop: int, *, transposed: bool) -> Tensor:
    """Rows ``start`` to ``stop`` of ``scaling * B A``, or of its transpose.

    Args:
        upper: B, float32, ``[out, r]``.
        lower: A, float32, ``[r, in]``.
        scaling: Factor of the product.
        start: First row of the result.
        stop: The row after the last one.
        transposed: Whether the weight is held as ``[in, out]``: embeddings and GPT-2's layers.

    Returns:
        float32, ``[stop - start, in]``, or ``[stop - start, out]`` transposed.
    """
    product = (upper @ lower[:, start:stop]).T if transposed else upper[start:stop] @ lower
    return product * scaling


def low_rank_product(upper: Tensor, lower: Tensor, scaling: float, *, transposed: bool) -> Tensor:
    """All rows; see ``low_rank_rows``."""
    rows, columns = (lower.shape[1], upper.shape[0]) if transposed else (upper.shape[0], lower.shape[1])
    step = block_rows(columns)
    blocks = [
        low_rank_rows(upper, lower, scaling, start, min(start + step, rows), transposed=transposed)
        for start in range(0, rows, step)
    ]
    return torch.cat(blocks) if len(blocks) > 1 else blocks[0]
