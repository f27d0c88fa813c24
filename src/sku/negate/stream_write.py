"""Writes one weight file of the result: blocks in a pool of threads, from file to file."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from sku.errors import ModelError
from sku.negate import arithmetic
from sku.negate.arithmetic import Arithmetic, Sums, block_rows, convert, low_rank_rows
from sku.negate.files import StoredTensor
from sku.negate.matching import unusable_result
from sku.negate.rounding import Rounding, draws_for
from sku.negate.stream_plan import Change, LowRankChange, Plan, ShardLayout, Work


@dataclass(frozen=True, kw_only=True)
class _Block:
    """A part of one tensor."""

    work: Work
    number: int
    start: int
    """First element."""
    stop: int
    at: int
    """Byte of the new file."""

    @property
    def size(self) -> int:
        """Bytes of the result."""
        return (self.stop - self.start) * self.work.dtype.itemsize


class ShardWriter:
    """Subtracts files of weights. One at a time is written, by all threads."""

    def __init__(self, plan: Plan, alpha: float, rounding: Rounding, seed: int) -> None:
        """Remembers what to do; nothing is opened yet."""
        self._plan = plan
        self._alpha = alpha
        self._seed = seed if rounding == "stochastic" else None
        self._open: dict[Path, int] = {}
        self._closing = ExitStack()
        self._local = threading.local()
        self._arithmetic = Arithmetic()
        self._factors = lru_cache(maxsize=4)(self._read_factors)

    def __enter__(self) -> ShardWriter:
        for path in {file.path for file in self._plan.inputs}:
            self._open[path] = os.open(path, os.O_RDONLY)
            self._closing.callback(os.close, self._open[path])
        return self

    def __exit__(self, *_error: object) -> None:
        self._closing.close()

    def write(self, layout: ShardLayout, folder: Path, pool: Executor, advance: Callable[[int], None]) -> Sums:
        """Writes a file whole: under another name until it is flushed to the disk.

        Args:
            layout: Of the plan.
            folder: To write into.
            pool: Computes the blocks.
            advance: Called with bytes that were written since the last call.

        Returns:
            The sums over its tensors.

        Raises:
            TaskVectorError: A difference or a result is not finite.
            ModelError: An input was cut off meanwhile.
            OSError: The disk is full, for instance.
        """
        unfinished = folder / f"{layout.name}.unfinished"
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            _reserve(descriptor, layout.size)
            _write_all(descriptor, memoryview(layout.header), 0)
            advance(len(layout.header))
            futures = {pool.submit(self._finish, block, descriptor): block for block in self._blocks(layout)}
            try:
                for future in as_completed(futures):
                    future.result()
                    advance(futures[future].size)
            except BaseException:
                for future in futures:
                    future.cancel()
                # Nothing may write to a descriptor that is closed below.
                for future in futures:
                    if not future.cancelled():
                        future.exception()
                raise
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        unfinished.replace(folder / layout.name)
        return Sums.total([future.result() for future in futures])

    def _blocks(self, layout: ShardLayout) -> Iterator[_Block]:
        for tensor in layout.source.tensors:
            work = self._plan.work[tensor.name]
            step = arithmetic.BLOCK_ELEMENTS
            if isinstance(work.change, LowRankChange):
                step = block_rows(tensor.shape[1]) * max(1, tensor.shape[1])
            for number, start in enumerate(range(0, tensor.elements, step)):
                stop = min(start + step, tensor.elements)
                at = layout.starts[tensor.name] + start * work.dtype.itemsize
                yield _Block(work=work, number=number, start=start, stop=stop, at=at)

    def _finish(self, block: _Block, descriptor: int) -> Sums:
        """Reads, computes and writes one block."""
        work, count = block.work, block.stop - block.start
        base, view = self._read(work.base, block.start, block.stop, "base")
        sums = Sums()
        if work.change is not None or work.dtype != work.base.dtype:
            result, view = self._buffer("result", work.dtype, count)
            draws = None
            if self._seed is not None and work.dtype.itemsize < 4:
                draws = draws_for(self._seed, work.base.name, block.number, count)
            if work.change is not None:
                sums = self._arithmetic.subtract(
                    base, self._other(work.change, block), result, self._alpha,
                    is_difference=self._plan.form != "model", draws=draws,
                )  # fmt: skip
                sums.check_finite(work.base.name, work.dtype)
            elif not convert(base, result, draws):
                raise unusable_result(work.base.name, work.dtype)
        _write_all(descriptor, view, block.at)
        return sums if work.counts else Sums()

    def _other(self, change: Change, block: _Block) -> Tensor:
        """The bad model's weights of a block, or their difference from the base's."""
        if isinstance(change, StoredTensor):
            return self._read(change, block.start, block.stop, "other")[0]
        columns = block.work.base.shape[1]
        start, stop = block.start // columns, block.stop // columns
        rows = low_rank_rows(*self._factors(change), change.scaling, start, stop, transposed=change.transposed)
        return rows.reshape(-1)

    def _read_factors(self, change: LowRankChange) -> tuple[Tensor, Tensor]:
        upper, lower = (
            self._read(tensor, 0, tensor.elements, None)[0].float().reshape(tensor.shape)
            for tensor in (change.upper, change.lower)
        )
        return upper, lower

    def _read(self, tensor: StoredTensor, start: int, stop: int, buffer: str | None) -> tuple[Tensor, memoryview]:
        """Elements of a stored tensor, flat, and their bytes; without the name of a buffer in memory of their own."""
        values, view = self._buffer(buffer, tensor.dtype, stop - start)
        at, left = tensor.start + start * tensor.dtype.itemsize, view
        while left:
            count = os.preadv(self._open[tensor.path], [left], at)
            if not count:
                raise ModelError(f"{tensor.path} was cut off while it was read; run again when nothing writes to it")
            left, at = left[count:], at + count
        return values, view

    def _buffer(self, name: str | None, dtype: torch.dtype, count: int) -> tuple[Tensor, memoryview]:
        """This thread's memory of that name, as numbers and as bytes."""
        size = max(1, count * dtype.itemsize)
        memory: bytearray | None = None if name is None else getattr(self._local, name, None)
        if memory is None or len(memory) < size:
            memory = bytearray(size)
            if name is not None:
                setattr(self._local, name, memory)
        numbers = torch.frombuffer(memory, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)
        return numbers, memoryview(memory)[: count * dtype.itemsize]


def _reserve(descriptor: int, size: int) -> None:
    """Takes the space at once, so that a disk too small is met before the work and the file lies in one piece."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def _write_all(descriptor: int, view: memoryview, at: int) -> None:
    while view:
        count = os.pwrite(descriptor, view, at)
        view, at = view[count:], at + count
