"""The order of an epoch for several processes: the same steps on the same examples as in one process."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler

from sku.data.joint import FILLER


class WholeBatches(Sampler[int]):
    """The places of an epoch in order, then ``FILLER`` until every process has as many batches as the others.

    accelerate would fill the end of an epoch up with examples from its start, which one process doesn't train on.
    """

    def __init__(self, size: int, batch: int) -> None:
        """Says how long the epoch is.

        Args:
            size: Places of the epoch.
            batch: Joint examples of one batch of all processes together.
        """
        self._size, self._batch = size, batch

    def __len__(self) -> int:
        """Places and fillers."""
        return -(-self._size // self._batch) * self._batch

    def __iter__(self) -> Iterator[int]:
        """Places, then fillers."""
        yield from range(self._size)
        yield from (FILLER for _ in range(len(self) - self._size))
