"""From joint examples to one batch: padded, or packed into one row.

R = rows, T = tokens of the longest row, B = joint examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sku.data.joint import JointExample
from sku.data.packing import RetainTokens, SourceRow, pack_rows
from sku.errors import DataError
from sku.losses import IGNORE_INDEX

PACKED = "packed"
"""Key of the ``PackedRows`` in a batch of ``PackedCollator``."""


class JointCollator:
    """Puts all rows of a batch of joint examples into one padded tensor, so that one forward pass does for all.

    Padding is told by ``attention_mask`` and ``labels`` alone; no one may look for the pad id, which can be that of a
    real token.
    """

    def __init__(self, pad_token_id: int) -> None:
        """Pads with this id of the tokenizer, to the longest row of the batch."""
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[JointExample]) -> dict[str, Tensor]:
        """Pads the rows on the right: each example's forget row, mismatched, retain and safe rows, in this order.

        Args:
            examples: B joint examples; kinds that a method doesn't ask for have no rows. Those that don't count are
                left out, but for one of them where no other is there.

        Returns:
            All int64:

            - ``input_ids``, ``attention_mask``, ``labels``: ``[R, T]``; pad id, 0 and ``IGNORE_INDEX`` on padding.
            - ``row_kind``: ``[R]``, ``FORGET``, ``MISMATCHED``, ``RETAIN`` or ``SAFE``.
            - ``row_example``: ``[R]``, position of the row's joint example in ``examples``.
            - ``forget_index``, ``retain_index``: ``[B]``, positions in the datasets, -1 where there is none.
            - ``retain_rows``: one for each ``RETAIN`` row, its position in the dataset.
            - ``counts``: ``[B]``, 1 for examples that are trained on, 0 for one that isn't.

        Raises:
            DataError: No example has a row.
        """
        rows, batch = _rows_and_indices(examples)
        ids = [torch.tensor(row.tokens.input_ids, dtype=torch.long) for row in rows]
        labels = [torch.tensor(row.tokens.labels, dtype=torch.long) for row in rows]
        return {
            "input_ids": self._pad(ids, self.pad_token_id),
            "attention_mask": self._pad([torch.ones_like(row) for row in ids], 0),
            "labels": self._pad(labels, IGNORE_INDEX),
            "row_kind": torch.tensor([row.kind for row in rows]),
            "row_example": torch.tensor([row.example for row in rows]),
            **batch,
        }

    def _pad(self, rows: Sequence[Tensor], value: int) -> Tensor:
        return pad_sequence(list(rows), batch_first=True, padding_value=value)


class PackedCollator:
    """Puts all rows of a batch of joint examples into one packed row, in the data loader's workers."""

    def __init__(self, *, share: bool, retain_tokens: RetainTokens) -> None:
        """Rows after the same prompt share its tokens (``tree``), or not (``flat``)."""
        self.share, self.retain_tokens = share, retain_tokens

    def __call__(self, examples: list[JointExample]) -> dict[str, Any]:
        """Packs the rows of B joint examples.

        Returns:
            ``input_ids`` ``[1, T]``; ``forget_index``, ``retain_index``, ``retain_rows`` and ``counts`` as of
            ``JointCollator``; and ``packed``: ``PackedRows``.

        Raises:
            DataError: No example has a row.
        """
        rows, batch = _rows_and_indices(examples)
        packed = pack_rows(rows, len(batch["counts"]), share=self.share, retain_tokens=self.retain_tokens)
        return {"input_ids": packed.input_ids, **batch, PACKED: packed}


def _rows_and_indices(examples: list[JointExample]) -> tuple[list[SourceRow], dict[str, Tensor]]:
    """Rows of the examples that count, or of one that doesn't, and what both collators say of these examples."""
    examples = [example for example in examples if example.counts] or examples[:1]
    rows = [
        SourceRow(kind=kind, example=position, tokens=row)
        for position, example in enumerate(examples)
        for kind, row in example.rows
    ]
    if not rows:
        raise DataError("a batch without any row can't be trained on: all modules are off or it has no examples")
    normal = [example.retain_rows for example in examples]
    return rows, {
        "forget_index": torch.tensor([example.forget_index for example in examples], dtype=torch.long),
        "retain_index": torch.tensor([places[0] if places else -1 for places in normal], dtype=torch.long),
        "retain_rows": torch.tensor([place for places in normal for place in places], dtype=torch.long),
        "counts": torch.tensor([example.counts for example in examples], dtype=torch.long),
    }
