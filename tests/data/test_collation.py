"""Padding: no literal pad id, no pad that is learned or attended to, rows in a known order."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sku.data.batches import ROWS, JointCollator, JointExample
from sku.data.examples import RowType
from sku.data.tokens import IGNORE_INDEX, TokenizedExample
from sku.errors import DataError

FORGET, MISMATCHED, RETAIN, SAFE = RowType


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
    batch = JointCollator(pad_token_id=9)(
        [
            joint(row([1, 2], [3]), (row([1, 2], [4, 5]), row([1, 2], [6])), row([7], [8]), 3, 5),
            joint(row([1], [2, 3, 4]), (), None, 0, -1),
        ]
    )
    rows = batch.pop(ROWS)
    expected = {
        "input_ids": [[1, 2, 3, 9], [1, 2, 4, 5], [1, 2, 6, 9], [7, 8, 9, 9], [1, 2, 3, 4]],
        "forget_index": [3, 0],
        "retain_rows": [5],
        "counts": [1, 1],
    }
    assert list(batch) == list(expected)
    for name, values in expected.items():
        assert batch[name].dtype == torch.int64
        assert batch[name].tolist() == values, name
    assert rows.model_inputs["attention_mask"].tolist() == [
        [1, 1, 1, 0],
        [1, 1, 1, 1],
        [1, 1, 1, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 1],
    ]
    assert rows.model_inputs["logits_to_keep"].int().tolist() == [
        [0, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 1, 0, 0],
        [1, 0, 0, 0],
        [1, 1, 1, 0],
    ]
    kept = {kind: (found.targets_N.tolist(), found.row_N.tolist(), found.example_M.tolist())
            for kind, found in rows.kept.items()}  # fmt: skip
    assert kept == {
        FORGET: ([3, 2, 3, 4], [0, 1, 1, 1], [0, 1]),
        MISMATCHED: ([4, 5, 6], [0, 0, 1], [0, 0]),
        RETAIN: ([8], [0], [0]),
    }
    assert rows.kept[FORGET].score_N.tolist() == [0, 5, 6, 7]
    assert rows.kept[FORGET].place_N.tolist() == [1, 16, 17, 18]


def test_fillers_are_left_out_but_for_one_where_nothing_else_is_there() -> None:
    real, filler = joint(row([1], [2])), replace(joint(row([3], [4])), counts=False)
    assert JointCollator()([real, filler, filler])["input_ids"].tolist() == [[1, 2]]
    alone = JointCollator()([filler, filler])
    assert (alone["input_ids"].tolist(), alone["counts"].tolist()) == ([[3, 4]], [0])


def test_modules_that_are_off_have_no_rows() -> None:
    rows = JointCollator()([joint(None, (row([1], [2]),)), joint(None, (), row([3], [4]))])[ROWS]
    assert {kind: kept.example_M.tolist() for kind, kept in rows.kept.items()} == {
        MISMATCHED: [0],
        RETAIN: [1],
    }
    for examples in ([], [joint(None)]):
        with pytest.raises(DataError, match="a batch without any row"):
            JointCollator()(examples)


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
    padded = JointCollator(pad_token_id=pad)([joint(row(prompt, answer)) for prompt, answer in rows])[ROWS]
    kept = padded.kept[FORGET]
    for index, (prompt, answer) in enumerate(rows):
        length = len(prompt) + len(answer)
        assert padded.model_inputs["attention_mask"][index].sum() == length
        assert padded.model_inputs["attention_mask"][index, :length].all()
        assert kept.targets_N[kept.row_N == index].tolist() == answer
        assert padded.input_ids[index, :length].tolist() == prompt + answer
        assert not padded.model_inputs["logits_to_keep"][index, length - 1 :].any()
