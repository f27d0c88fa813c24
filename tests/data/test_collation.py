"""Padding: no literal pad id, no pad that is learned or attended to, rows in a known order."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sku.data.batches import JointCollator
from sku.data.joint import FORGET, MISMATCHED, RETAIN, JointExample
from sku.data.tokens import IGNORE_INDEX, TokenizedExample
from sku.errors import DataError


def row(prompt: list[int], answer: list[int]) -> TokenizedExample:
    return TokenizedExample(
        input_ids=(*prompt, *answer),
        labels=(*[IGNORE_INDEX] * len(prompt), *answer),
        answer_start=len(prompt),
    )


def joint(
    guided: TokenizedExample | None,
    mismatched: tuple[TokenizedExample, ...] = (),
    retain: TokenizedExample | None = None,
    forget_index: int = 0,
    retain_index: int = -1,
) -> JointExample:
    rows = [] if guided is None else [(FORGET, guided)]
    rows += [(MISMATCHED, row) for row in mismatched]
    rows += [] if retain is None else [(RETAIN, replace(retain, example_id=retain_index))]
    return JointExample(rows=tuple(rows), forget_index=forget_index)


def test_a_batch_written_out() -> None:
    batch = JointCollator(9)(
        [
            joint(row([1, 2], [3]), (row([1, 2], [4, 5]), row([1, 2], [6])), row([7], [8]), 3, 5),
            joint(row([1], [2, 3, 4]), (), None, 0, -1),
        ]
    )
    n = IGNORE_INDEX
    expected = {
        "input_ids": [[1, 2, 3, 9], [1, 2, 4, 5], [1, 2, 6, 9], [7, 8, 9, 9], [1, 2, 3, 4]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]],
        "labels": [[n, n, 3, n], [n, n, 4, 5], [n, n, 6, n], [n, 8, n, n], [n, 2, 3, 4]],
        "row_kind": [FORGET, MISMATCHED, MISMATCHED, RETAIN, FORGET],
        "row_example": [0, 0, 0, 0, 1],
        "forget_index": [3, 0],
        "retain_index": [5, -1],
        "retain_rows": [5],
        "counts": [1, 1],
    }
    assert list(batch) == list(expected)
    for name, values in expected.items():
        assert batch[name].dtype == torch.int64
        assert batch[name].tolist() == values, name


def test_fillers_are_left_out_but_for_one_where_nothing_else_is_there() -> None:
    real, filler = joint(row([1], [2])), replace(joint(row([3], [4])), counts=False)
    assert JointCollator(0)([real, filler, filler])["input_ids"].tolist() == [[1, 2]]
    alone = JointCollator(0)([filler, filler])
    assert (alone["input_ids"].tolist(), alone["counts"].tolist()) == ([[3, 4]], [0])


def test_modules_that_are_off_have_no_rows() -> None:
    batch = JointCollator(0)([joint(None, (row([1], [2]),)), joint(None, (), row([3], [4]))])
    assert batch["row_kind"].tolist() == [MISMATCHED, RETAIN]
    assert batch["row_example"].tolist() == [0, 1]
    for examples in ([], [joint(None)]):
        with pytest.raises(DataError, match="a batch without any row"):
            JointCollator(0)(examples)


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 3), min_size=1, max_size=6), st.lists(st.integers(0, 3), min_size=1, max_size=6)
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 3),
)
def test_no_pad_is_learned_or_attended_to_and_no_real_token_is_taken_for_one(
    rows: list[tuple[list[int], list[int]]], pad: int
) -> None:
    """Bug 8: padding was told by ``id == 1``. Here the pad id is a real token's id too."""
    batch = JointCollator(pad)([joint(row(prompt, answer)) for prompt, answer in rows])
    for index, (prompt, answer) in enumerate(rows):
        length = len(prompt) + len(answer)
        assert batch["attention_mask"][index].sum() == length
        assert batch["attention_mask"][index, :length].all()
        assert (batch["labels"][index] != IGNORE_INDEX).sum() == len(answer)
        assert batch["input_ids"][index, :length].tolist() == prompt + answer
        assert (batch["labels"][index, length:] == IGNORE_INDEX).all()


def test_padding_changes_no_label_count() -> None:
    alone = JointCollator(0)([joint(row([1], [2, 3]))])
    padded = JointCollator(0)([joint(row([1], [2, 3])), joint(row([1] * 50, [2]))])
    assert (alone["labels"][0] != IGNORE_INDEX).sum() == (padded["labels"][0] != IGNORE_INDEX).sum() == 2
