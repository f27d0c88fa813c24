"""Batches, padded and packed: rows by hand, and each row of a packed one read back whole from its path."""

from __future__ import annotations

import dataclasses
import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sku.data.batches import ROWS, JointCollator, JointExample, Rows, Segment, SourceRow, plan_paths
from sku.data.examples import RetainTokens, RowType
from sku.data.tokens import IGNORE_INDEX, TokenizedExample
from sku.errors import DataError

FORGET, MISMATCHED, RETAIN, SAFE = RowType


def row(prompt: list[int], answer: list[int]) -> TokenizedExample:
    return TokenizedExample(
        input_ids=(*prompt, *answer), labels=(*(IGNORE_INDEX,) * len(prompt), *answer), answer_start=len(prompt)
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
    rows += [] if retain is None else [(RETAIN, dataclasses.replace(retain, example_id=retain_index))]
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
    assert rows.model_inputs["attention_mask"].sum(1).tolist() == [3, 4, 3, 2, 4]
    assert rows.model_inputs["logits_to_keep"].nonzero().tolist() == [
        [0, 1], [1, 1], [1, 2], [2, 1], [3, 0], [4, 0], [4, 1], [4, 2],
    ]  # fmt: skip
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
    """Modules that are off have no rows; a batch needs one."""
    real, filler = joint(row([1], [2])), dataclasses.replace(joint(row([3], [4])), counts=False)
    assert JointCollator()([real, filler, filler])["input_ids"].tolist() == [[1, 2]]
    alone = JointCollator()([filler, filler])
    assert (alone["input_ids"].tolist(), alone["counts"].tolist()) == ([[3, 4]], [0])
    rows = JointCollator()([joint(None, (row([1], [2]),)), joint(None, (), row([3], [4]))])[ROWS]
    assert {kind: kept.example_M.tolist() for kind, kept in rows.kept.items()} == {MISMATCHED: [0], RETAIN: [1]}
    for examples in ([], [joint(None)]):
        with pytest.raises(DataError, match="a batch without any row"):
            JointCollator()(examples)


def source(kind: RowType, example: int, prompt: list[int], answer: list[int]) -> SourceRow:
    return SourceRow(kind=kind, example=example, tokens=row(prompt, answer))


def pack_rows(
    rows: list[SourceRow], num_examples: int, *, share: bool, retain_tokens: RetainTokens = "answer"
) -> Rows:
    return JointCollator("tree" if share else "flat", retain_tokens=retain_tokens).lay_out(rows, num_examples)


SOURCES = [
    source(FORGET, 0, [1, 2, 3], [10, 11]),
    source(MISMATCHED, 0, [1, 2, 3], [20, 21, 22]),
    source(MISMATCHED, 0, [1, 2, 3], [10, 31]),
    source(RETAIN, 0, [1, 2], [40, 41]),
    source(FORGET, 1, [5], [50]),
]


def test_a_tree_by_hand() -> None:
    """The last token of a row predicts nothing that counts and is left out; the retain row shares nothing."""
    packed = pack_rows(SOURCES, 2, share=True)
    assert packed.input_ids.tolist() == [[1, 2, 3, 10, 20, 21, 10, 1, 2, 40, 5]]
    assert packed.model_inputs["position_ids"].tolist() == [[0, 1, 2, 3, 3, 4, 3, 0, 1, 2, 0]]
    assert packed.paths.segments == (
        Segment(3), Segment(1, 0), Segment(2, 0), Segment(1, 0), Segment(3), Segment(1),
    )  # fmt: skip
    assert packed.model_inputs["logits_to_keep"].tolist() == [2, 3, 4, 5, 6, 8, 9, 10]
    mismatched = packed.kept[MISMATCHED]
    # The prompt's last token serves the first target of each answer after it.
    assert mismatched.place_N.tolist() == [2, 4, 5, 2, 6]
    assert mismatched.targets_N.tolist() == [20, 21, 22, 10, 31]
    assert mismatched.row_N.tolist() == [0, 0, 0, 1, 1]
    assert mismatched.example_M.tolist() == [0, 0]
    forget = packed.kept[FORGET]
    assert forget.place_N.tolist() == [2, 3, 10]
    assert forget.score_N.tolist() == [0, 1, 7]
    assert forget.example_M.tolist() == [0, 1]


def test_positions_of_a_normal_row_that_count() -> None:
    for tokens, positions, targets in (("answer", [1, 2], [40, 41]), ("all", [0, 1, 2], [2, 40, 41])):
        packed = pack_rows([SOURCES[3]], 1, share=True, retain_tokens=tokens)  # type: ignore[arg-type]
        assert packed.kept[RETAIN].place_N.tolist() == positions
        assert packed.kept[RETAIN].targets_N.tolist() == targets


tokens_of_a_row = st.lists(st.integers(0, 3), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(tokens_of_a_row, tokens_of_a_row), min_size=1, max_size=5), share=st.booleans())
def test_every_row_is_read_back_from_its_path(rows: list[tuple[list[int], list[int]]], share: bool) -> None:
    """Whatever is shared: what stands before each target, along the path, is what stands before it in the row."""
    sources = [source(FORGET if index == 0 else MISMATCHED, 0, *each) for index, each in enumerate(rows)]
    packed = pack_rows(sources, 1, share=share)
    paths, keys = packed.paths, packed.input_ids[0]
    places = torch.cat([packed.kept[kind].place_N for kind in sorted(packed.kept)]).tolist()
    plan = [paths.key_index_K[start:end].tolist() for start, end in pairwise(paths.key_starts.tolist())]
    up_to = {place: path[: at + 1] for path in plan for at, place in enumerate(path)}
    contexts = [keys[up_to[place]].tolist() for place in places]
    targets = torch.cat([packed.kept[kind].targets_N for kind in sorted(packed.kept)]).tolist()
    expected = [
        (list(prompt + answer[:index]), answer[index]) for prompt, answer in rows for index in range(len(answer))
    ]
    assert list(zip(contexts, targets, strict=True)) == expected
    assert sum(segment.length for segment in paths.segments) == packed.input_ids.shape[1]


def test_masks_by_hand() -> None:
    """A prefix of 2, branches of 2 and 1, and a row of 2; with a window of 2."""
    paths = plan_paths([Segment(2), Segment(2, 0), Segment(1, 0), Segment(2)])
    assert paths.segment_mask(0, None) is None
    assert paths.segment_mask(0, 2) is None
    whole = paths.segment_mask(1, None)
    assert whole is not None
    assert whole.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    branch = paths.segment_mask(1, 2)
    assert branch is not None
    assert branch.int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert paths.segment_mask(1, 2) is branch
    assert paths.query_starts.tolist() == [0, 2, 4, 5, 7]
    assert paths.key_starts.tolist() == [0, 2, 6, 9, 11]
    assert paths.key_index_K.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 6]
    assert (paths.longest_segment, paths.longest_path) == (2, 4)


def test_a_plan_comes_whole_from_a_worker() -> None:
    packed = pack_rows(SOURCES, 2, share=True)
    again = pickle.loads(pickle.dumps(packed))
    assert torch.equal(again.paths.key_index_K, packed.paths.key_index_K)
    assert torch.equal(again.model_inputs["logits_to_keep"], packed.model_inputs["logits_to_keep"])
    moved = packed.to("meta")
    assert moved.paths.segments == packed.paths.segments
    assert moved.kept[FORGET].score_N.is_meta
