"""From prompts to replies: ``prompts`` become token ids, ``writing`` goes on from them, ``replies`` are recorded.

Here: batches of similar length, shared by the processes of a job, smaller ones where a GPU's memory runs out. Every
process calls ``in_batches`` with the same arguments. A round of batches is answered, gathered and saved before the
next one begins, so that an interrupted job loses one round at most. A Python error in one process reaches the others
in the same round, as a ``ProcessError``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from sku.errors import EvaluationError
from sku.processes import ALONE, Processes

Progress = Callable[[int, int], None]
"""Called with the number of examples done and their total."""
StageProgress = Callable[[str, int, int], None]
"""Called with what is being done, the number done and their total."""

_log = logging.getLogger(__name__)
T = TypeVar("T")


def stage(progress: StageProgress | None, name: str) -> Progress | None:
    """The progress of one stage."""
    return None if progress is None else partial(progress, name)


def plan_batches(
    lengths: Sequence[int],
    *,
    batch_size: int,
    max_padded_tokens: int | None = None,
    groups: Sequence[Hashable] | None = None,
) -> list[list[int]]:
    """Cuts examples into batches of indices, longest first: little is padded, and memory runs out early or never.

    Args:
        lengths: Tokens of each example.
        batch_size: Most examples at once.
        max_padded_tokens: Most tokens at once, padding included; one example always goes through.
        groups: Of each example: those of one group stay together, where its longest one stands.
    """
    keys = range(len(lengths)) if groups is None else groups
    longest: dict[Hashable, tuple[int, int]] = {}  # Group -> tokens of its longest, negative, and where it begins.
    for index, key in enumerate(keys):
        most, first = longest.get(key, (0, index))
        longest[key] = (min(most, -lengths[index]), first)
    order = sorted(range(len(lengths)), key=lambda index: (*longest[keys[index]], -lengths[index]))
    batches: list[list[int]] = []
    while order:
        size = batch_size
        if max_padded_tokens is not None:
            size = max(1, min(size, max_padded_tokens // max(1, -longest[keys[order[0]]][0])))
        batches.append(order[:size])
        order = order[size:]
    return batches


def in_batches(
    lengths: Sequence[int],
    run: Callable[[list[int]], Sequence[T]],
    *,
    batch_size: int,
    processes: Processes = ALONE,
    finished: Mapping[int, T] | None = None,
    keep: Callable[[list[T]], None] | None = None,
    progress: Progress | None = None,
    max_padded_tokens: int | None = None,
    groups: Sequence[Hashable] | None = None,
) -> list[T]:
    """Results for all examples, in order, made in the batches of ``plan_batches``, which the processes share.

    The batches are those of one process: which process runs a batch, or whether some were finished before, changes
    no result.

    Args:
        lengths: Tokens of each example; with ``batch_size``, ``max_padded_tokens``, ``groups`` as of ``plan_batches``.
        run: One result for each index of a batch; called again with half of it when a GPU's memory ran out.
        batch_size: Most examples at once.
        processes: Each runs every n-th batch.
        finished: Index -> result that is there already; a batch is run only where one of its own is missing.
        keep: Called in the main process with the results of each round.
        progress: Called in the main process after each round.
        max_padded_tokens: Most tokens at once.
        groups: What stays together.

    Raises:
        EvaluationError: Memory runs out on a single example.
        ProcessError: Another process failed.
    """
    results = dict(finished or {})
    batches = plan_batches(lengths, batch_size=batch_size, max_padded_tokens=max_padded_tokens, groups=groups)
    missing = [batch for batch in batches if not results.keys() >= set(batch)]
    done, limit = len(lengths) - sum(map(len, missing)), batch_size

    def answered(batch: list[int]) -> list[tuple[int, T]]:
        nonlocal limit
        found: list[tuple[int, T]] = []
        while len(found) < len(batch):
            part = batch[len(found) : len(found) + limit]
            results_of_part = _if_it_fits(run, part)
            if results_of_part is not None:
                found += zip(part, results_of_part, strict=True)
                continue
            if len(part) == 1:
                raise EvaluationError(
                    f"GPU memory runs out on a single example of {lengths[part[0]]} tokens: lower "
                    "evaluate.max_new_tokens, use a smaller dtype, or a larger GPU"
                )
            if limit == batch_size:
                _log.warning("GPU memory ran out with %d examples at once; going on with fewer", len(part))
            limit = len(part) // 2
        return found

    for start in range(0, len(missing), processes.count):
        turn = missing[start : start + processes.count]
        own = turn[processes.rank] if processes.rank < len(turn) else []
        new = processes.gather(partial(answered, own))
        results.update(new)
        if keep is not None:
            processes.run_on_rank0(partial(keep, [result for _, result in new]))
        done += sum(map(len, turn))
        if progress is not None and processes.is_main:
            progress(done, len(lengths))
    return [results[index] for index in range(len(lengths))]


def _if_it_fits(run: Callable[[list[int]], Sequence[T]], part: list[int]) -> Sequence[T] | None:
    try:
        return run(part)
    except torch.OutOfMemoryError:
        pass  # Only once this block is left are the tensors that the exception holds on to free.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def pad(rows: Sequence[Sequence[int]], value: int, *, left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pads B rows of token ids with ``value``, before the tokens (generation) or after them (scoring).

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
