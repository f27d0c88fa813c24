"""Writes one weight file of the result: blocks in a pool of threads, from file to file."""

from __future__ import annotations

import math
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
from sku.negate import low_rank
from sku.negate.matching import unusable_difference, unusable_result
from sku.negate.record import Rounding
from sku.negate.rounding import draws_for
from sku.negate.safetensors_layout import StoredFile, StoredTensor, make_header
from sku.negate.stream_arithmetic import Arithmetic, Sums, convert
from sku.negate.stream_plan import LowRankChange, Plan, Work

_COPIED_BYTES = 8 * 2**20


@dataclass(frozen=True, kw_only=True)
class ShardLayout:
    """How a weight file of the result will look."""

    source: StoredFile
    header: bytes
    starts: dict[str, int]
    """Name of a tensor -> byte of the new file at which it begins."""
    size: int

    @property
    def name(self) -> str:
        """Of the file: the base's."""
        return self.source.path.name


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


def shard_layout(source: StoredFile, plan: Plan) -> ShardLayout:
    """The header of a new file: the base's own, byte for byte, unless types change.

    Args:
        source: File of the base.
        plan: Says the types.

    Returns:
        Where everything will lie.
    """
    work = [plan.work[tensor.name] for tensor in source.tensors]
    if all(item.dtype == item.base.dtype for item in work):
        starts = {tensor.name: tensor.start for tensor in source.tensors}
        return ShardLayout(source=source, header=source.header, starts=starts, size=source.identity[0])
    work.sort(key=lambda item: -item.dtype.itemsize)  # So that each begins at a multiple of its own size.
    header, starts = make_header(((item.base.name, item.dtype, item.base.shape) for item in work), source.metadata)
    size = len(header) + sum(item.base.elements * item.dtype.itemsize for item in work)
    return ShardLayout(source=source, header=header, starts=starts, size=size)


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
            layout: From ``shard_layout``.
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
            blocks = list(self._blocks(layout))
            futures = {pool.submit(self._finish, block, descriptor): block for block in blocks}
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
            step = _block_elements(work)
            for number, start in enumerate(range(0, tensor.elements, step)):
                yield _Block(
                    work=work,
                    number=number,
                    start=start,
                    stop=min(start + step, tensor.elements),
                    at=layout.starts[tensor.name] + start * work.dtype.itemsize,
                )

    def _finish(self, block: _Block, descriptor: int) -> Sums:
        """Reads, computes and writes one block."""
        work = block.work
        if work.change is None and work.dtype == work.base.dtype:
            self._copy(block, descriptor)
            return Sums()
        count = block.stop - block.start
        base = self._read(work.base, block.start, block.stop, "base")
        result, view = self._buffer("result", work.dtype, count)
        draws = None
        if self._seed is not None and work.dtype.itemsize < 4:
            draws = draws_for(self._seed, work.base.name, block.number, count)
        sums = Sums()
        if work.change is None:
            if not convert(base, result, draws):
                raise unusable_result(work.base.name, str(work.dtype))
        else:
            sums = Arithmetic.of_thread(self._local).subtract(
                base, self._other(block), result, self._alpha, is_difference=_is_difference(work), draws=draws
            )
            _check_finite(work, sums)
        _write_all(descriptor, view, block.at)
        return sums if work.counts else Sums()

    def _other(self, block: _Block) -> Tensor:
        """The bad model's weights of a block, or their difference from the base's."""
        change = block.work.change
        assert change is not None
        if not isinstance(change, LowRankChange):
            return self._read(change.tensor, block.start, block.stop, "other")
        columns = block.work.base.shape[1]
        upper, lower = self._factors(change)
        return low_rank.low_rank_rows(
            upper,
            lower,
            change.scaling,
            block.start // columns,
            block.stop // columns,
            transposed=change.transposed,
        ).reshape(-1)

    def _read_factors(self, change: LowRankChange) -> tuple[Tensor, Tensor]:
        upper, lower = (
            self._read(tensor, 0, tensor.elements, None).float().reshape(tensor.shape)
            for tensor in (change.upper, change.lower)
        )
        return upper, lower

    def _read(self, tensor: StoredTensor, start: int, stop: int, buffer: str | None) -> Tensor:
        """Elements of a stored tensor, flat; without the name of a buffer in memory of their own."""
        values, view = self._buffer(buffer, tensor.dtype, stop - start)
        at = tensor.start + start * tensor.dtype.itemsize
        while view:
            count = os.preadv(self._open[tensor.path], [view], at)
            if not count:
                raise ModelError(f"{tensor.path} was cut off while it was read; run again when nothing writes to it")
            view, at = view[count:], at + count
        return values

    def _copy(self, block: _Block, descriptor: int) -> None:
        source = self._open[block.work.base.path]
        at, to, left = block.work.base.start + block.start * block.work.dtype.itemsize, block.at, block.size
        while left:
            count = _copy_range(source, descriptor, left, at, to)
            if not count:
                raise ModelError(f"{block.work.base.path} was cut off while it was read; fetch it again")
            at, to, left = at + count, to + count, left - count

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


def _block_elements(work: Work) -> int:
    if isinstance(work.change, LowRankChange):
        columns = max(1, work.base.shape[1])
        return low_rank.block_rows(columns) * columns
    if work.change is None and work.dtype == work.base.dtype:
        return _COPIED_BYTES // work.dtype.itemsize
    return low_rank.BLOCK_ELEMENTS


def _is_difference(work: Work) -> bool:
    return isinstance(work.change, LowRankChange) or (work.change is not None and work.change.is_difference)


def _check_finite(work: Work, sums: Sums) -> None:
    """A sum of squares is finite exactly where all its terms are: no float32 squared is too large for float64."""
    if not math.isfinite(sums.difference):
        raise unusable_difference(work.base.name)
    if not math.isfinite(sums.wanted) or not math.isfinite(sums.applied):
        raise unusable_result(work.base.name, str(work.dtype))


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


def _copy_range(source: int, target: int, count: int, at: int, to: int) -> int:
    """Copies inside the kernel where it can."""
    try:
        return os.copy_file_range(source, target, count, at, to)
    except (AttributeError, OSError):  # Another file system, or none that knows it.
        return os.pwrite(target, os.pread(source, count, at), to)
