"""What stage 1 sees: orders and draws of the joint examples."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from transformers import PreTrainedTokenizerFast

from sku.data.examples import ForgetRetainData, RetainExample, RowPlan, RowType
from sku.data.joint import JointDataset, draw_others
from sku.data.tokens import Encoder, PaperFormat
from sku.errors import DataError

FORGET, MISMATCHED, RETAIN, SAFE = RowType


def rows_of_sku(answers: int) -> RowPlan:
    return RowPlan(forget=True, mismatched=answers, retain=True)


GROUPS = ["a", "a", "b", "c", "d", "e", "f", "f"]


def test_no_answer_of_the_own_prompt_and_none_twice() -> None:
    for position in range(200):
        for group in GROUPS:
            drawn = draw_others(GROUPS, 3, group, f"0/{position}")
            assert len(set(drawn)) == 3
            assert group not in {GROUPS[other] for other in drawn}


def test_more_answers_than_other_prompts_have(data: ForgetRetainData, tokenizer: PreTrainedTokenizerFast) -> None:
    """Of 6 answers one prompt owns 2: 4 are left for it."""
    with pytest.raises(DataError, match="only 4 answers of other prompts"):
        JointDataset(data, Encoder(tokenizer, PaperFormat("</s>")), rows=rows_of_sku(5), seed=0)


@pytest.fixture
def joint(data: ForgetRetainData, tokenizer: PreTrainedTokenizerFast) -> JointDataset:
    return JointDataset(data, Encoder(tokenizer, PaperFormat("</s>")), rows=rows_of_sku(3), seed=0)


def test_an_epoch_visits_every_forget_pair_once_in_a_new_order(joint: JointDataset) -> None:
    orders = []
    for epoch in range(4):
        joint.set_epoch(epoch)
        order = [joint[place].forget_index for place in range(len(joint))]
        assert sorted(order) == list(range(6))
        orders.append(order)
    assert len({tuple(order) for order in orders}) > 1
    joint.set_epoch(0)
    assert [joint[place].forget_index for place in range(6)] == orders[0], "epochs can be met in any order"


def test_mismatched_rows_are_the_own_prompt_with_answers_of_others(
    joint: JointDataset, data: ForgetRetainData, tokenizer: PreTrainedTokenizerFast
) -> None:
    answers_of: dict[str, set[str]] = {}
    for example in data.forget_train:
        answers_of.setdefault(example.prompt, set()).add(example.answer)
    seen: Counter[tuple[str, str]] = Counter()
    for epoch in range(3):
        joint.set_epoch(epoch)
        for place in range(len(joint)):
            drawn = joint[place]
            prompt = data.forget_train[drawn.forget_index].prompt
            for row in drawn.of(MISMATCHED):
                before = tokenizer.decode(list(row.input_ids[: row.answer_start]))
                answer = str(tokenizer.decode(list(row.input_ids[row.answer_start :]))).strip()
                assert before == f"### Question: {prompt}\n ### Answer:"
                assert answer not in answers_of[prompt]
                assert answer in {other.answer for other in data.forget_train}
                seen[prompt, answer] += 1
    # 5 prompts: bread owns 2 of 6 answers (4 others), the other four own 1 (5 others each): 24 pairs.
    assert len(seen) == 24


def with_retain(data: ForgetRetainData, number: int) -> ForgetRetainData:
    rows = tuple(RetainExample(prompt=f"normal number {n} ?", answer="it is .") for n in range(number))
    return dataclasses.replace(data, retain_train=rows)


@pytest.mark.parametrize("number", [1, 4, 25])
def test_normal_examples_go_round_whatever_their_number(
    number: int, data: ForgetRetainData, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Each lap of ``number`` visits meets every normal example once, across the borders of epochs of 6."""
    joint = JointDataset(
        with_retain(data, number), Encoder(tokenizer, PaperFormat("</s>")), rows=rows_of_sku(0), seed=0
    )
    visits = []
    for epoch in range(10):
        joint.set_epoch(epoch)
        visits += [joint[place].retain_rows[0] for place in range(6)]
    laps = [visits[start : start + number] for start in range(0, 60 - number + 1, number)]
    assert len(laps) == 60 // number
    assert all(sorted(lap) == list(range(number)) for lap in laps)
    if number > 4:
        assert len({tuple(lap) for lap in laps}) > 1


END = 2
"""Id of the token that ends an answer."""


@pytest.mark.parametrize(
    "rows",
    [
        RowPlan(forget=True, mismatched=2, retain=True),
        RowPlan(mismatched=2, mismatched_from="retain"),
        RowPlan(safe="data or refusal", retain=True),
    ],
)
def test_no_row_of_any_method_teaches_an_end_behind_an_answer_that_was_cut_off(
    rows: RowPlan, data: ForgetRetainData, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Finished answers do, but for harmful ones; of the normal ones here every second one was cut off."""
    normal = tuple(dataclasses.replace(row, finished=index % 2 == 0) for index, row in enumerate(data.retain_train))
    harmful = tuple(
        dataclasses.replace(row, safe_answer=f"better not {index}", safe_answer_finished=index % 2 == 0)
        for index, row in enumerate(data.forget_train)
    )
    split = dataclasses.replace(data, retain_train=normal, forget_train=harmful)
    found = JointDataset(split, Encoder(tokenizer, PaperFormat("</s>")), rows=rows, seed=0)
    ends: dict[bool, set[bool]] = {True: set(), False: set()}
    for epoch in range(4):
        found.set_epoch(epoch)
        for example in map(found.__getitem__, range(len(found))):
            assert all(END not in row.input_ids for row in example.of(FORGET))
            taught = [*example.of(RETAIN)]
            if rows.mismatched_from == "retain":
                taught += example.of(MISMATCHED)
            else:
                assert all(END not in row.input_ids for row in example.of(MISMATCHED))
            for row in taught:
                ends[normal[row.example_id].finished].add(END in row.input_ids)
            for row in example.of(SAFE):
                ends[harmful[example.forget_index].safe_answer_finished].add(END in row.input_ids)
    assert ends == {True: {True}, False: {False}}
