"""Batches of similar length, shared by the processes of a job, smaller ones where a GPU's memory runs out.

Every process calls ``evaluate`` with the same arguments. A round of batches is answered, gathered and saved before
the next one begins, so that an interrupted job loses one round at most. A Python error in one process reaches the
others in the same round, as a ``ProcessError``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from sku.errors import EvaluationError
from sku.evaluate.records import grouped
from sku.processes import ALONE as ALONE
from sku.processes import Processes as Processes
from sku.processes import current_processes as current_processes

Progress = Callable[[int, int], None]
"""Called with the number of examples done and their total."""

StageProgress = Callable[[str, int, int], None]
"""Called with what is being done, the number done and their total."""

_log = logging.getLogger(__name__)
T = TypeVar("T")


def stage(progress: StageProgress | None, name: str) -> Progress | None:
    """The progress of one stage."""
    return None if progress is None else lambda done, total: progress(name, done, total)


def plan_batches(
    lengths: Sequence[int],
    *,
    batch_size: int,
    max_padded_tokens: int | None = None,
    groups: Sequence[Hashable] | None = None,
) -> list[list[int]]:
    """Cuts examples into batches, longest first: little is padded, and memory runs out early or never.

    Args:
        lengths: Tokens of each example.
        batch_size: Most examples at once.
        max_padded_tokens: Most tokens at once, padding included; one example always goes through.
        groups: Of each example: those of one group stay together, where its longest one stands.

    Returns:
        Batches of indices.
    """
    together = grouped(range(len(lengths)), lambda index: index if groups is None else groups[index]).values()
    longest = {found[0]: max(lengths[index] for index in found) for found in together}
    order = [
        (longest[found[0]], index)
        for found in sorted(together, key=lambda found: (-longest[found[0]], found[0]))
        for index in sorted(found, key=lambda index: (-lengths[index], index))
    ]
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        size = batch_size
        if max_padded_tokens is not None:
            size = max(1, min(size, max_padded_tokens // max(1, order[start][0])))
        batches.append([index for _, index in order[start : start + size]])
        start += size
    return batches


def in_batches(
    lengths: Sequence[int],
    run: Callable[[list[int]], Sequence[T]],
    *,
    batch_size: int,
    processes: Processes = ALONE,
    max_padded_tokens: int | None = None,
    groups: Sequence[Hashable] | None = None,
    finished: Mapping[int, T] | None = None,
    keep: Callable[[list[T]], None] | None = None,
    progress: Progress | None = None,
) -> list[T]:
    """Results for all examples, made in the batches of ``plan_batches``, which the processes share.

    The batches are those of one process: which process runs a batch, or whether some were finished before, changes
    no result.

    Args:
        lengths: Tokens of each example.
        run: One result for each index of a batch; called again with half of it when a GPU's memory ran out.
        batch_size: Most examples at once.
        processes: Each runs every n-th batch.
        max_padded_tokens: As of ``plan_batches``.
        groups: As of ``plan_batches``.
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
    batches = plan_batches(lengths, batch_size=batch_size, max_padded_tokens=max_padded_tokens, groups=groups)
    missing = [batch for batch in batches if not results.keys() >= set(batch)]
    parts = _Parts(lengths, run)
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
        new = processes.gather(partial(parts.run, own, partial(tell, done)))
        results.update(new)
        if keep is not None:
            processes.run_on_rank0(partial(keep, [result for _, result in new]))
        done += sum(map(len, turn))
        tell(done, 0)
    return [results[index] for index in range(len(lengths))]


class _Parts(Generic[T]):
    """Runs batches, in smaller parts once a GPU's memory has run out."""

    def __init__(self, lengths: Sequence[int], run: Callable[[list[int]], Sequence[T]]) -> None:
        self._lengths, self._run = lengths, run
        self._limit: int | None = None

    def run(self, batch: list[int], tell: Callable[[int], None]) -> list[tuple[int, T]]:
        """The results of one batch, and how many there are after each part."""
        found: list[tuple[int, T]] = []
        while len(found) < len(batch):
            part = batch[len(found) : len(found) + (self._limit or len(batch))]
            results = self._if_it_fits(part)
            if results is not None:
                found += zip(part, results, strict=True)
                tell(len(found))
                continue
            if len(part) == 1:
                raise EvaluationError(
                    f"GPU memory runs out on a single example of {self._lengths[part[0]]} tokens: lower "
                    "evaluate.max_new_tokens, use a smaller dtype, or a larger GPU"
                )
            if self._limit is None:
                _log.warning("GPU memory ran out with %d examples at once; going on with fewer", len(part))
            self._limit = len(part) // 2
        return found

    def _if_it_fits(self, part: list[int]) -> Sequence[T] | None:
        try:
            return self._run(part)
        except torch.OutOfMemoryError:
            pass  # Only once this block is left are the tensors that the exception holds on to free.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def pad(rows: Sequence[Sequence[int]], value: int, *, left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pads rows to one length.

    Args:
        rows: B rows of token ids.
        value: What to pad with.
        left: Whether padding comes before the tokens (generation) or after them (scoring).
        device: Where the tensors go.

    Returns:
        ``[B, T]`` ids and ``[B, T]`` mask, 1 on the rows' own tokens.
    """
    own = [torch.tensor(row, dtype=torch.long) for row in rows]
    fill = partial(pad_sequence, batch_first=True, padding_side="left" if left else "right")
    return fill(own, padding_value=value).to(device), fill([torch.ones_like(row) for row in own]).to(device)


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Switches dropout off and puts every module back into the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
