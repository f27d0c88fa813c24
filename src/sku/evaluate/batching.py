"""Batches of similar length, smaller ones where a GPU's memory runs out, and the model left as it was found."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sku.errors import EvaluationError

Progress = Callable[[int, int], None]
"""Called with the number of examples done and their total."""

_log = logging.getLogger(__name__)


def plan_batches(lengths: Sequence[int], *, batch_size: int, max_padded_tokens: int | None = None) -> list[list[int]]:
    """Cuts examples into batches, longest first: little is padded, and memory runs out early or never.

    Args:
        lengths: Tokens of each example.
        batch_size: Most examples at once.
        max_padded_tokens: Most tokens at once, padding included; one example always goes through.

    Returns:
        Batches of indices.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        size = batch_size
        if max_padded_tokens is not None:
            size = max(1, min(size, max_padded_tokens // max(1, lengths[order[start]])))
        batches.append(order[start : start + size])
        start += size
    return batches


class MemoryGuard:
    """Runs batches, in smaller parts once a GPU's memory has run out."""

    def __init__(self, lengths: Sequence[int]) -> None:
        """Begins with whole batches.

        Args:
            lengths: Tokens of each example, for the message.
        """
        self._lengths = lengths
        self._limit: int | None = None

    def run(self, batch: list[int], run: Callable[[list[int]], None]) -> Iterator[int]:
        """Runs one batch.

        Args:
            batch: Indices.
            run: Handles some of them, all or nothing.

        Yields:
            How many are done, after each part.

        Raises:
            EvaluationError: Memory runs out on a single example.
        """
        start = 0
        while start < len(batch):
            part = batch[start : start + (self._limit or len(batch))]
            if _fits_memory(run, part):
                start += len(part)
                yield start
                continue
            if len(part) == 1:
                raise EvaluationError(
                    f"GPU memory runs out on a single example of {self._lengths[part[0]]} tokens: lower "
                    "evaluate.max_new_tokens, use a smaller dtype, or a larger GPU"
                )
            if self._limit is None:
                _log.warning("GPU memory ran out with %d examples at once; going on with fewer", len(part))
            self._limit = len(part) // 2


def run_in_batches(
    lengths: Sequence[int],
    run: Callable[[list[int]], None],
    *,
    batch_size: int,
    max_padded_tokens: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Calls ``run`` with the batches of ``plan_batches``, in this process.

    Args:
        lengths: Tokens of each example.
        run: Handles one batch, all of it or nothing; called again with half of it when a GPU's memory ran out.
        batch_size: Most examples at once.
        max_padded_tokens: Most tokens at once, padding included; one example always goes through.
        progress: Called after each batch.

    Raises:
        EvaluationError: Memory runs out on a single example.
    """
    guard = MemoryGuard(lengths)
    done = 0
    for batch in plan_batches(lengths, batch_size=batch_size, max_padded_tokens=max_padded_tokens):
        for count in guard.run(batch, run):
            if progress is not None:
                progress(done + count, len(lengths))
        done += len(batch)


def _fits_memory(run: Callable[[list[int]], None], batch: list[int]) -> bool:
    try:
        run(batch)
    except torch.OutOfMemoryError:
        pass  # Only once this block is left are the tensors that the exception holds on to free.
    else:
        return True
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


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
    longest = max(len(row) for row in rows)
    fillers = [[value] * (longest - len(row)) for row in rows]
    ids = [[*filler, *row] if left else [*row, *filler] for row, filler in zip(rows, fillers, strict=True)]
    gaps = [[0] * len(filler) for filler in fillers]
    masks = [[*gap, *[1] * len(row)] if left else [*[1] * len(row), *gap] for row, gap in zip(rows, gaps, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(masks, device=device)


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
