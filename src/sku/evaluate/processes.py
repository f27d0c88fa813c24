"""An evaluation of several processes: all share the batches, one writes and judges.

Every process calls ``evaluate`` with the same arguments. A round of batches is answered, gathered and saved before
the next one begins, so that an interrupted job loses one round at most. A Python error in one process reaches the
others in the same round, as a ``ProcessError``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from sku.evaluate.batching import MemoryGuard, Progress, plan_batches
from sku.processes import ALONE, Processes, current_processes

__all__ = ["ALONE", "Processes", "current_processes", "shared_batches"]

T = TypeVar("T")


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
        EvaluationError: Memory runs out on a single example.
        ProcessError: Another process failed.
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
