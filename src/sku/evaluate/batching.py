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


def run_in_batches(
    lengths: Sequence[int],
    run: Callable[[list[int]], None],
    *,
    batch_size: int,
    max_padded_tokens: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Calls ``run`` with batches of indices, longest first: little is padded, and memory runs out early or never.

    Args:
        lengths: Tokens of each example.
        run: Handles one batch, all of it or nothing; called again with half of it when a GPU's memory ran out.
        batch_size: Most examples at once.
        max_padded_tokens: Most tokens at once, padding included; one example always goes through.
        progress: Called after each batch.

    Raises:
        EvaluationError: Memory runs out on a single example.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start, told = 0, False
    while start < len(order):
        size = batch_size
        if max_padded_tokens is not None:
            size = max(1, min(size, max_padded_tokens // max(1, lengths[order[start]])))
        batch = order[start : start + size]
        if not _fits_memory(run, batch):
            if len(batch) == 1:
                raise EvaluationError(
                    f"GPU memory runs out on a single example of {lengths[batch[0]]} tokens: lower "
                    "evaluate.max_new_tokens, use a smaller dtype, or a larger GPU"
                )
            batch_size = len(batch) // 2
            if not told:
                _log.warning("GPU memory ran out with %d examples at once; going on with fewer", len(batch))
                told = True
            continue
        start += len(batch)
        if progress is not None:
            progress(start, len(order))


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
