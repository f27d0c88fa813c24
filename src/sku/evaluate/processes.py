"""Several processes under ``accelerate launch`` or ``torchrun``: all share the batches, one writes and judges.

Every process calls ``evaluate`` with the same arguments. A round of batches is answered, gathered and saved before
the next one begins, so that an interrupted job loses one round at most. A Python error in one process reaches the
others in the same round, as an ``EvaluationError``. A process that dies without one (killed, out of memory) is seen by
the launcher, which ends the others; without a launcher they wait for ``TIMEOUT`` at most.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from sku.errors import EvaluationError
from sku.evaluate.batching import MemoryGuard, Progress, plan_batches

T = TypeVar("T")

TIMEOUT = timedelta(hours=12)
"""Longest wait for another process; judging by a hosted judge, which only one process does, may take hours."""


@dataclass(frozen=True)
class _Failure:
    rank: int
    message: str


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of this job, seen from one of them."""

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and judges."""
        return self.rank == 0

    def on_main(self, action: Callable[[], T]) -> T:
        """Runs something in the main process alone.

        Args:
            action: Called once; its result must be picklable where there are several processes.

        Returns:
            Its result, in every process.

        Raises:
            EvaluationError: In the other processes, where it failed in the main one; there its own error is raised.
        """
        if self.count == 1:
            return action()
        box: list[Any] = [None]
        if self.is_main:
            try:
                box[0] = action()
            except Exception as error:
                broadcast_object_list([_Failure(self.rank, str(error))])
                raise
        broadcast_object_list(box)
        self._check(box)
        result: T = box[0]
        return result

    def gather(self, action: Callable[[], list[T]]) -> list[T]:
        """Runs something in every process and puts the results together, in the order of the processes.

        Args:
            action: Called in each process; its result must be picklable where there are several.

        Returns:
            All results, in every process.

        Raises:
            EvaluationError: In the other processes, where it failed in one; there its own error is raised.
        """
        if self.count == 1:
            return action()
        try:
            own = action()
        except Exception as error:
            gather_object([_Failure(self.rank, str(error))])
            raise
        parts = gather_object([own])
        self._check(parts)
        return [entry for part in parts for entry in part]

    def _check(self, parts: Sequence[object]) -> None:
        for part in parts:
            if isinstance(part, _Failure):
                raise EvaluationError(f"process {part.rank} of {self.count} failed: {part.message}")


ALONE = Processes()
"""A job of one process."""


def current_processes() -> Processes:
    """The processes of this job; must be asked before a model is loaded, so that each takes its own GPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ALONE
    state = PartialState(
        cpu=not torch.accelerator.is_available() or "ACCELERATE_USE_CPU" in os.environ, timeout=TIMEOUT
    )
    return Processes(rank=state.process_index, count=state.num_processes)


def shared_batches(
    lengths: Sequence[int],
    run: Callable[[list[int]], list[T]],
    *,
    batch_size: int,
    processes: Processes,
    max_padded_tokens: int | None = None,
    finished: Mapping[int, T] | None = None,
    keep: Callable[[list[T]], None] | None = None,
    progress: Progress | None = None,
) -> list[T]:
    """Results for all examples, made in batches that the processes share.

    The batches are those of one process: which process runs a batch, or whether some were finished before, changes
    no result.

    Args:
        lengths: Tokens of each example.
        run: One result for each index of a batch; called again with half of it when a GPU's memory ran out.
        batch_size: Most examples at once.
        processes: Each runs every n-th batch.
        max_padded_tokens: As for ``plan_batches``.
        finished: Index -> result that is there already; a batch is run only where one of its own is missing.
        keep: Called in the main process with the results of each round.
        progress: Called in the main process.

    Returns:
        One result per example, in order.

    Raises:
        EvaluationError: Memory runs out on a single example, or another process failed.
    """
    results = dict(finished or {})
    batches = plan_batches(lengths, batch_size=batch_size, max_padded_tokens=max_padded_tokens)
    missing = [batch for batch in batches if not results.keys() >= set(batch)]
    guard = MemoryGuard(lengths)
    done = len(lengths) - sum(map(len, missing))
    told = -1

    def tell(before: int, more: int) -> None:
        nonlocal told
        count = before + more
        if progress is not None and processes.is_main and count != told:
            told = count
            progress(count, len(lengths))

    for start in range(0, len(missing), processes.count):
        turn = missing[start : start + processes.count]
        own = turn[processes.rank] if processes.rank < len(turn) else []
        new = processes.gather(partial(_run_parts, guard, own, run, partial(tell, done)))
        results.update(new)
        if keep is not None:
            processes.on_main(partial(keep, [result for _, result in new]))
        done += sum(map(len, turn))
        tell(done, 0)
    return [results[index] for index in range(len(lengths))]


def _run_parts(
    guard: MemoryGuard, batch: list[int], run: Callable[[list[int]], list[T]], tell: Callable[[int], None]
) -> list[tuple[int, T]]:
    found: list[tuple[int, T]] = []

    def run_part(part: list[int]) -> None:
        found.extend(zip(part, run(part), strict=True))

    for count in guard.run(batch, run_part):
        tell(count)
    return found
