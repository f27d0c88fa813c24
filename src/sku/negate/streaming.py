"""Stage 2 from file to file: ``theta_u = theta_o - alpha * (theta_bad - theta_o)`` without loading a model.

Each thread holds a few blocks in memory; an adapter is held whole, its factors in float32. The bits are those of
``sku.negate.negate``. The new folder has the base's shards, names and header metadata.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, as_completed, wait
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from io import FileIO
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from sku.config.check import check_alpha
from sku.errors import ModelError, RecipeError, TaskVectorError
from sku.negate import arithmetic
from sku.negate.arithmetic import (
    EMPTY_ADAPTER,
    MOST_THREADS,
    Arithmetic,
    LowRank,
    Negation,
    Rounding,
    Sums,
    block_pool,
    block_rows,
    draws_for,
    unusable_result,
)
from sku.negate.files import (
    ADAPTER_CONFIG,
    ShardLayout,
    StoredFile,
    StoredTensor,
    copy_companions,
    new_layout,
    write_config,
    write_index,
)
from sku.negate.matching import EQUAL_MODELS, BadForm, Change, FolderSource, bad_form, match_folders
from sku.storage import check_new, check_space, new_folder, resumable_folder, write_json

Progress = Callable[[int, int], None]
"""Called with the bytes that are done and those there are."""
_FINISHED = "finished.json"
"""Names the weight files that are whole, with their sums: what an interrupted call is gone on from."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What becomes of one stored tensor of the base."""

    base: StoredTensor
    change: Change | None
    """None where the tensor stays as it is."""
    counts: bool
    """Whether the record counts it: of tied weights that are stored twice, one."""
    dtype: torch.dtype
    """Of the result."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that was decided."""

    settings: list[Path]
    """Files beside the weights that decide the result, where they are there."""
    form: BadForm
    layouts: tuple[ShardLayout, ...]
    """Of the new files, by name."""
    work: Mapping[str, Work]
    """By the tensor's name."""
    dtype: torch.dtype
    """Of the result, or of most of it."""
    inputs: tuple[StoredFile, ...]
    """All files that will be read."""

    @property
    def size(self) -> int:
        """Of all new files, in bytes."""
        return sum(layout.size for layout in self.layouts)

    @property
    def changed(self) -> list[Work]:
        """The tensors from which something is subtracted."""
        return [work for work in self.work.values() if work.change is not None]

    @property
    def empty_message(self) -> str | None:
        """What to say where the difference turns out to be zero; None where that is no mistake."""
        return {"model": EQUAL_MODELS, "adapter": EMPTY_ADAPTER, "vector": None}[self.form]

    def identities(self) -> dict[str, Any]:
        """What tells whether inputs are those of an earlier call: size, time and header of each file, and settings."""
        settings = (path for path in self.settings if path.is_file())
        return {
            "weights": {str(file.path.resolve()): list(file.identity) for file in self.inputs},
            "settings": {str(path.resolve()): sha256(path.read_bytes()).hexdigest() for path in settings},
        }


@dataclass(frozen=True, kw_only=True)
class NegatedFolder:
    """What a streamed subtraction left."""

    record: Negation
    left_out: tuple[str, ...]
    """Files and folders beside the base's weights that were not copied: its model card, other weights."""
    resumed_files: int
    """Weight files that an interrupted call had finished."""


def negate_folders(
    base: Path | str,
    bad: Path | str,
    out: Path | str,
    alpha: float = 1.0,
    *,
    output_dtype: torch.dtype | None = None,
    rounding: Rounding = "nearest",
    seed: int = 0,
    threads: int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> NegatedFolder:
    """Subtracts what stage 1 learned from the original weights, from folder to folder.

    Args:
        base: Folder of the original model, in safetensors. It is only read, and so is ``bad``.
        bad: Folder of the bad model, of its LoRA adapter, or a saved task vector.
        out: New folder for the unlearned model; loads with transformers.
        alpha: How much to subtract, 0 or more; the paper uses 1. 0 gives the original weights bit for bit.
        output_dtype: Type of the result; that of each stored tensor if None. The arithmetic is float32.
        rounding: How a result becomes bfloat16 or float16: to the nearest number, or by chance to one of the two
            neighbours, which on average loses nothing of the change.
        seed: Of the stochastic rounding. Equal seeds give equal bits, with any number of threads.
        threads: How many read, compute and write; at most 4 by default, which suffice for a fast disk.
        resume: Go on with the files that a killed call with the same inputs had finished.
        progress: Called after each block.

    Returns:
        The record, and what was not copied.

    Raises:
        RecipeError: ``alpha``, ``rounding`` or ``threads`` is not usable.
        ModelError: A file is damaged, quantized or no model's.
        TaskVectorError: The two don't fit, or a result is not finite.
        OutputError: ``out`` exists or can't be written, or what is to be resumed had other inputs.
    """
    check_alpha(alpha)
    wanted = FolderNegation(
        base=Path(base), bad=Path(bad), out=Path(out), alpha=alpha, output_dtype=output_dtype, rounding=rounding,
        seed=seed, threads=threads, resume=resume,
    )  # fmt: skip
    return wanted.run(wanted.plan(), progress)


@dataclass(frozen=True, kw_only=True)
class FolderNegation:
    """A subtraction from folder to folder that is planned and then run: the arguments of ``negate_folders``."""

    base: Path
    bad: Path
    out: Path
    alpha: float
    """Below 0 the change is added, as by methods that train the unlearned model itself."""
    output_dtype: torch.dtype | None = None
    base_dtype: torch.dtype | None = None
    """Type in which the base was loaded where the change was trained: a longer stored one is rounded to it first."""
    rounding: Rounding = "nearest"
    seed: int = 0
    threads: int | None = None
    resume: bool = False
    resumable: bool = True
    """Whether what a killed or interrupted call had finished stays, for ``resume``."""

    def plan(self) -> Plan:
        """All that ``negate_folders`` checks before it reads weights; nothing is written.

        Raises:
            SkuError: As there, but for what only weights show: results that are not finite, no difference.
        """
        if self.rounding not in get_args(Rounding):
            raise RecipeError(f"rounding is {self.rounding}; it must be one of {', '.join(get_args(Rounding))}")
        if self.threads is not None and self.threads < 1:
            raise RecipeError(f"threads is {self.threads}; it must be at least 1")
        check_new(self.out)
        source, form = FolderSource(self.base, "base"), bad_form(self.bad)
        matched, files = match_folders(source, self.bad, form)
        tensors = [tensor for stored in source.files for tensor in stored.tensors]
        work = {
            tensor.name: Work(
                base=tensor,
                change=matched.changes.get(tensor.name),
                counts=tensor.name not in matched.twins,
                dtype=self.output_dtype or tensor.dtype if tensor.name in source.weights else tensor.dtype,
            )
            for tensor in tensors
        }
        dtypes = {name: own.dtype for name, own in work.items()}
        sizes = Counter[torch.dtype]()
        for name, tensor in source.weights.items():
            sizes[dtypes[name]] += tensor.elements
        return Plan(
            settings=[self.base / "config.json", self.bad / ADAPTER_CONFIG, self.bad / "config.json"],
            form=form,
            layouts=tuple(new_layout(stored, dtypes) for stored in source.files),
            work=work,
            dtype=sizes.most_common(1)[0][0] if sizes else torch.float32,
            inputs=(*source.files, *files),
        )

    def run(
        self,
        plan: Plan,
        progress: Progress | None = None,
        written: Callable[[Negation], None] = lambda _record: None,
    ) -> NegatedFolder:
        """``negate_folders`` by that plan: no header is read again.

        Args:
            plan: Of this call.
            progress: As there.
            written: Called with the record before the folder gets its name.

        Raises:
            SkuError: As there; an input that has changed since the plan was made is refused.
        """
        inputs = plan.identities() | {
            "alpha": self.alpha, "dtype": str(self.output_dtype), "rounding": self.rounding, "seed": self.seed,
            "base_dtype": str(self.base_dtype), "block": arithmetic.BLOCK_ELEMENTS,
        }  # fmt: skip
        if not self.resume:
            check_space(self.out, plan.size, f"the unlearned model in {self.out}")
        place = resumable_folder(self.out, inputs, resume=self.resume) if self.resumable else new_folder(self.out)
        with place as folder:
            # A call that was killed at its very end left it; no folder may load while files are copied into it anew.
            (folder / "config.json").unlink(missing_ok=True)
            done = _finished(folder, plan) if self.resumable else {}
            resumed = len(done)
            self._write_shards(plan, folder, done, progress)
            total = Sums.total([sums for layout in plan.layouts for sums in done[layout.name]])
            if total.difference == 0 and plan.empty_message is not None:
                raise TaskVectorError(plan.empty_message)
            for file in plan.inputs:
                file.check_unchanged()
            left_out = copy_companions(self.base, folder, [layout.name for layout in plan.layouts])
            write_index(self.base, folder, sum(layout.size - len(layout.header) for layout in plan.layouts))
            write_config(self.base, folder, self.output_dtype)
            record = Negation(
                alpha=abs(self.alpha),
                task_vector_norm=math.sqrt(total.difference),
                base_norm=math.sqrt(total.base),
                changed_weights=sum(work.counts for work in plan.changed) if self.alpha else 0,
                dtype=str(plan.dtype).removeprefix("torch."),
                survival=total.survival,
                rounding=self.rounding,
                rounding_seed=self.seed,
            )
            written(record)
        return NegatedFolder(record=record, left_out=left_out, resumed_files=resumed)

    def _write_shards(self, plan: Plan, folder: Path, done: dict[str, list[Sums]], progress: Progress | None) -> None:
        written = sum(layout.size for layout in plan.layouts if layout.name in done)

        def advance(count: int) -> None:
            nonlocal written
            written += count
            if progress is not None:
                progress(written, plan.size)

        advance(0)
        threads = min(MOST_THREADS, os.cpu_count() or 1) if self.threads is None else self.threads
        with ExitStack() as opened, block_pool(threads) as pool:
            files = {file.path: opened.enter_context(file.path.open("rb", buffering=0)) for file in plan.inputs}
            writer = _ShardWriter(plan, self, files)
            for layout in plan.layouts:
                if layout.name not in done:
                    done[layout.name] = writer.write(layout, folder, pool, advance)
                    if self.resumable:
                        _keep_finished(folder, done)


def _keep_finished(folder: Path, done: Mapping[str, list[Sums]]) -> None:
    kept = {file: [dataclasses.asdict(own) for own in sums] for file, sums in done.items()}
    write_json(folder.parent / _FINISHED, kept)


def _finished(folder: Path, plan: Plan) -> dict[str, list[Sums]]:
    """The files that an interrupted call has left whole."""
    path = folder.parent / _FINISHED
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    # After a kill after the last rename the list is left and the files are gone.
    there = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    whole = {layout.name for layout in plan.layouts if there.get(layout.name) == layout.size}
    return {file: [Sums(**own) for own in sums] for file, sums in found.items() if file in whole}


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


class _ShardWriter:
    """Subtracts files of weights, block by block. One file at a time is written, by all threads."""

    def __init__(self, plan: Plan, wanted: FolderNegation, files: Mapping[Path, FileIO]) -> None:
        """Remembers what to do; ``files`` are all that will be read."""
        self._plan, self._alpha, self._base_dtype, self._files = plan, wanted.alpha, wanted.base_dtype, files
        self._seed = wanted.seed if wanted.rounding == "stochastic" else None
        self._local = threading.local()
        self._arithmetic = Arithmetic()

    def write(self, layout: ShardLayout, folder: Path, pool: Executor, advance: Callable[[int], None]) -> list[Sums]:
        """Writes a file whole: under another name until it is flushed to the disk.

        Args:
            layout: Of the plan.
            folder: To write into.
            pool: Computes the blocks.
            advance: Called with bytes that were written since the last call.

        Returns:
            The sums of each changed tensor, tied ones once.

        Raises:
            TaskVectorError: A difference or a result is not finite.
            ModelError: An input was cut off meanwhile.
            OSError: The disk is full, for instance.
        """
        unfinished = folder / f"{layout.name}.unfinished"
        with unfinished.open("wb", buffering=0) as file:
            descriptor = file.fileno()
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
                wait(futures)  # Nothing may write to a descriptor that is closed.
                raise
            os.fsync(descriptor)
        unfinished.replace(folder / layout.name)
        parts: dict[str, list[Sums]] = {}
        for future, block in futures.items():
            if block.work.counts and block.work.change is not None:
                parts.setdefault(block.work.base.name, []).append(future.result())
        return [Sums.total(own) for own in parts.values()]

    def _blocks(self, layout: ShardLayout) -> Iterator[_Block]:
        for tensor in layout.source.tensors:
            work = self._plan.work[tensor.name]
            step = arithmetic.BLOCK_ELEMENTS
            if isinstance(work.change, LowRank):
                step = block_rows(tensor.shape[1]) * max(1, tensor.shape[1])
            for number, start in enumerate(range(0, tensor.elements, step)):
                stop = min(start + step, tensor.elements)
                at = layout.starts[tensor.name] + start * work.dtype.itemsize
                yield _Block(work=work, number=number, start=start, stop=stop, at=at)

    def _finish(self, block: _Block, descriptor: int) -> Sums:
        """Reads, computes and writes one block."""
        work, count = block.work, block.stop - block.start
        base = self._read(work.base, block.start, self._buffer("base", work.base.dtype, count))
        loaded = self._base_dtype
        if loaded is not None and work.base.is_weight and torch.promote_types(base.dtype, loaded) != loaded:
            base = base.to(loaded)
        result = base
        sums = Sums()
        if work.change is not None or work.dtype != base.dtype:
            result = self._buffer("result", work.dtype, count)
            draws = None
            if self._seed is not None and work.dtype.itemsize < 4:
                draws = draws_for(self._seed, work.base.name, block.number, count)
            if work.change is not None:
                sums = self._arithmetic.subtract(
                    base, self._other(work.change, block), result, self._alpha,
                    is_difference=self._plan.form != "model", draws=draws,
                )  # fmt: skip
                sums.check_finite(work.base.name, work.dtype)
            elif not arithmetic.convert(base, result, draws):
                raise unusable_result(work.base.name, work.dtype)
        _write_all(descriptor, _bytes_of(result), block.at)
        return sums

    def _other(self, change: Change, block: _Block) -> Tensor:
        """The bad model's weights of a block, or their difference from the base's."""
        if isinstance(change, StoredTensor):
            return self._read(change, block.start, self._buffer("other", change.dtype, block.stop - block.start))
        columns = block.work.base.shape[1]
        return change.rows(block.start // columns, block.stop // columns).reshape(-1)

    def _read(self, tensor: StoredTensor, start: int, values: Tensor) -> Tensor:
        """Fills flat numbers with the elements of a stored tensor from ``start`` on, and gives them back."""
        at, left = tensor.start + start * tensor.dtype.itemsize, _bytes_of(values)
        while left:
            count = os.preadv(self._files[tensor.path].fileno(), [left], at)
            if not count:
                raise ModelError(f"{tensor.path} was cut off while it was read; run again when nothing writes to it")
            left, at = left[count:], at + count
        return values

    def _buffer(self, name: str, dtype: torch.dtype, count: int) -> Tensor:
        """This thread's memory of that name."""
        size = count * dtype.itemsize
        memory: Tensor | None = getattr(self._local, name, None)
        if memory is None or len(memory) < size:
            memory = torch.empty(size, dtype=torch.uint8)
            setattr(self._local, name, memory)
        return memory[:size].view(dtype)


def _bytes_of(values: Tensor) -> memoryview:
    """The memory of flat numbers."""
    return values.view(torch.uint8).numpy().data


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
