"""``base - alpha * (bad - base)`` from tensors to tensors, in the pieces in which files are subtracted.

Whole tensors would take several times the model's size in temporary ones, and most of the time goes to getting that
memory from the system. Pieces stay in a core's cache, and each thread has one set of buffers.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from sku.negate.low_rank import BLOCK_ELEMENTS
from sku.negate.matching import check_same_shape, unusable_difference, unusable_result
from sku.negate.stream_arithmetic import Arithmetic, Sums

MOST_THREADS = 4
"""More don't help: memory is the limit by then."""


def subtract_tensors(
    weights: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    alpha: float,
    *,
    are_differences: bool,
) -> Sums:
    """Subtracts in float32 and rounds once, tensor by tensor.

    Args:
        weights: Name -> original weight, of any floating type, on any device. They are not changed.
        others: Name -> the bad model's weight, or the difference itself, of the same shape; all names or some.
        targets: Name -> where the result goes, in its own type.
        alpha: How much; 0 copies the original bit for bit.
        are_differences: Whether ``others`` are differences.

    Returns:
        The sums over all tensors of ``others``.

    Raises:
        TaskVectorError: Shapes don't fit, or a difference or a result is not finite.
    """
    work = _Work()
    parts: list[Sums] = []
    with torch.no_grad(), _pool() as pool:
        for name, other in others.items():
            check_same_shape(name, weights[name], other)
            sums = work.subtract(pool, weights[name], other, targets[name], alpha, are_differences=are_differences)
            _check_finite(name, sums, targets[name].dtype)
            parts.append(sums)
    return Sums.total(parts)


class _Work:
    """The buffers of all threads."""

    def __init__(self) -> None:
        self._local = threading.local()

    def subtract(
        self, pool: Executor, weight: Tensor, other: Tensor, target: Tensor, alpha: float, *, are_differences: bool
    ) -> Sums:
        """One tensor, block by block."""
        base, changed = _flat(weight), _flat(other)
        direct = target.device.type == "cpu" and target.is_contiguous()
        result = target.detach().view(-1) if direct else torch.empty(base.numel(), dtype=target.dtype)

        def block(start: int) -> Sums:
            piece = slice(start, start + BLOCK_ELEMENTS)
            return Arithmetic.of_thread(self._local).subtract(
                base[piece], changed[piece], result[piece], alpha, is_difference=are_differences, draws=None
            )

        sums = Sums.total(list(pool.map(block, range(0, base.numel(), BLOCK_ELEMENTS))))
        if not direct:
            target.copy_(result.view(target.shape))
        return sums


@contextmanager
def _pool() -> Iterator[Executor]:
    """Threads for the blocks, as many as torch would have used; torch itself takes one in each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # The pool is the parallelism; its threads begin with this number.
    try:
        with ThreadPoolExecutor(min(MOST_THREADS, threads), "negate") as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().reshape(-1)


def _check_finite(name: str, sums: Sums, dtype: torch.dtype) -> None:
    """A sum of squares is finite exactly where all its terms are: no float32 squared is too large for float64."""
    if not math.isfinite(sums.difference):
        raise unusable_difference(name)
    if not math.isfinite(sums.wanted) or not math.isfinite(sums.applied):
        raise unusable_result(name, str(dtype))
