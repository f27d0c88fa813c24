"""Rows of a joint example beyond those of SKU: safe answers, and normal answers behind harmful prompts."""

from __future__ import annotations

import dataclasses

import pytest
from transformers import PreTrainedTokenizerFast

from sku.data.examples import ForgetExample, ForgetRetainData, RowPlan, RowType
from sku.data.joint import REFUSALS, JointDataset
from sku.data.tokens import Encoder, PaperFormat, TokenizedExample
from sku.errors import DataError

FORGET, MISMATCHED, RETAIN, SAFE = RowType


def joint(data: ForgetRetainData, tokenizer: PreTrainedTokenizerFast, rows: RowPlan, seed: int = 0) -> JointDataset:
    return JointDataset(data, Encoder(tokenizer, PaperFormat("</s>")), rows=rows, seed=seed)


def with_safe_answers(data: ForgetRetainData, every: int) -> ForgetRetainData:
    """Every so many harmful examples have a safe answer that names their place."""
    examples = [
        dataclasses.replace(example, safe_answer=f"the safe one is {place}" if place % every == 0 else None)
        for place, example in enumerate(data.forget_train)
    ]
    return dataclasses.replace(data, forget_train=tuple(examples))


def text_of(row: TokenizedExample, tokenizer: PreTrainedTokenizerFast) -> str:
    learned = [label for label in row.labels if label != -100]
    text = tokenizer.decode(learned, skip_special_tokens=True)
    assert isinstance(text, str)
    return text.strip()


def test_only_prompts_with_a_safe_answer_are_trained_on(
    data: ForgetRetainData, tokenizer: PreTrainedTokenizerFast
) -> None:
    given = with_safe_answers(data, every=2)
    dataset = joint(given, tokenizer, RowPlan(forget=True, safe="data"))
    assert len(dataset) == (len(data.forget_train) + 1) // 2
    assert dataset.reports["safe_answers"].kept == len(dataset)
    for place in range(len(dataset)):
        example = dataset[place]
        [forget], [safe] = example.of(FORGET), example.of(SAFE)
        assert text_of(safe, tokenizer) == f"the safe one is {example.forget_index}"
        prompt = forget.input_ids[: forget.answer_start - 1]
        assert safe.input_ids[: len(prompt)] == prompt
        assert safe.labels[-1] == tokenizer.eos_token_id, "a safe answer is learned with its end"


def test_prompts_without_one_get_a_refusal(data: ForgetRetainData, tokenizer: PreTrainedTokenizerFast) -> None:
    given = with_safe_answers(data, every=2)
    dataset = joint(given, tokenizer, RowPlan(safe="data or refusal"))
    assert len(dataset) == len(data.forget_train)
    texts = {
        dataset[place].forget_index: text_of(dataset[place].of(SAFE)[0], tokenizer) for place in range(len(dataset))
    }
    for index, text in texts.items():
        assert text == f"the safe one is {index}" if index % 2 == 0 else text in REFUSALS
    again = joint(given, tokenizer, RowPlan(safe="data or refusal"))
    assert [again[0].of(SAFE), again[1].of(SAFE)] == [
        dataset[0].of(SAFE),
        dataset[1].of(SAFE),
    ]


def test_no_safe_answer_at_all(data: ForgetRetainData, tokenizer: PreTrainedTokenizerFast) -> None:
    plain = dataclasses.replace(
        data,
        forget_train=tuple(
            ForgetExample(prompt=example.prompt, answer=example.answer) for example in data.forget_train
        ),
    )
    with pytest.raises(DataError, match="none of the .* harmful examples has a safe answer"):
        joint(plain, tokenizer, RowPlan(safe="data"))


def test_normal_answers_behind_harmful_prompts(data: ForgetRetainData, tokenizer: PreTrainedTokenizerFast) -> None:
    """K different normal answers, learned with their end, behind the harmful prompt of the example."""
    dataset = joint(data, tokenizer, RowPlan(forget=True, mismatched=2, mismatched_from="retain"))
    answers = {example.answer for example in data.retain_train}
    for place in range(len(dataset)):
        example = dataset[place]
        assert example.of(RETAIN) == ()
        [forget] = example.of(FORGET)
        texts = [text_of(row, tokenizer) for row in example.of(MISMATCHED)]
        assert len(texts) == 2
        assert set(texts) <= answers
        for row in example.of(MISMATCHED):
            assert row.labels[-1] == tokenizer.eos_token_id
            prompt = forget.input_ids[: forget.answer_start - 1]
            assert row.input_ids[: len(prompt)] == prompt
    other = joint(data, tokenizer, RowPlan(forget=True, mismatched=2, mismatched_from="retain"), seed=1)
    assert [other[place].of(MISMATCHED) for place in range(4)] != [dataset[place].of(MISMATCHED) for place in range(4)]
