"""From joint examples to one padded batch. R = rows, T = tokens of the longest row, B = joint examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from sku.data.joint import FORGET, MISMATCHED, RETAIN, SAFE, JointExample
from sku.data.tokenization import TokenizedExample
from sku.errors import DataError
from sku.losses import IGNORE_INDEX


class JointCollator:
    """Puts all rows of a batch of joint examples into one padded tensor, so that one forward pass does for all.

    Padding is told by ``attention_mask`` and ``labels`` alone; no one may look for the pad id, which can be that of a
    real token.
    """

    def __init__(self, pad_token_id: int, *, multiple_of: int = 1) -> None:
        """Says how rows are padded.

        Args:
            pad_token_id: Of the tokenizer.
            multiple_of: The length of the longest row is rounded up to a multiple of this.
        """
        self.pad_token_id, self.multiple_of = pad_token_id, multiple_of

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
        examples = [example for example in examples if example.counts] or examples[:1]
        rows = [(kind, position, row) for position, example in enumerate(examples) for kind, row in rows_of(example)]
        if not rows:
            raise DataError("a batch without any row can't be trained on: all modules are off or it has no examples")
        ids = [torch.tensor(row.input_ids, dtype=torch.long) for _, _, row in rows]
        return {
            "input_ids": self._pad(ids, self.pad_token_id),
            "attention_mask": self._pad([torch.ones_like(row) for row in ids], 0),
            "labels": self._pad([torch.tensor(row.labels, dtype=torch.long) for _, _, row in rows], IGNORE_INDEX),
            "row_kind": torch.tensor([kind for kind, _, _ in rows], dtype=torch.long),
            "row_example": torch.tensor([position for _, position, _ in rows], dtype=torch.long),
            "forget_index": torch.tensor([example.forget_index for example in examples], dtype=torch.long),
            "retain_index": torch.tensor([example.retain_index for example in examples], dtype=torch.long),
            "retain_rows": torch.tensor(
                [place for example in examples for place in example.retain_rows], dtype=torch.long
            ),
            "counts": torch.tensor([example.counts for example in examples], dtype=torch.long),
        }

    def _pad(self, rows: Sequence[Tensor], value: int) -> Tensor:
        padded = pad_sequence(list(rows), batch_first=True, padding_value=value)
        length = -(-padded.shape[1] // self.multiple_of) * self.multiple_of
        return functional.pad(padded, (0, length - padded.shape[1]), value=value)


def rows_of(example: JointExample) -> Iterator[tuple[int, TokenizedExample]]:
    """Kind and tokens of each row of a joint example, in the order of a batch."""
    if example.forget is not None:
        yield FORGET, example.forget
    for mismatched in example.mismatched:
        yield MISMATCHED, mismatched
    if example.retain is not None:
        yield RETAIN, example.retain
    for row in example.more_retain:
        yield RETAIN, row
    if example.safe is not None:
        yield SAFE, example.safe
