"""Rows of a joint example beyond those of SKU: safe answers, normal answers behind harmful prompts, framed prompts."""

from __future__ import annotations

import dataclasses
from importlib import resources
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sku.data.examples import ForgetExample, ForgetRetainData, RowPlan, RowType, group_of
from sku.data.joint import PLACE, REFUSALS, JointDataset, framed, framings
from sku.data.load import load_forget_retain
from sku.data.tokens import Encoder, PaperFormat, TokenizedExample
from sku.errors import DataError

FORGET, MISMATCHED, RETAIN, SAFE = RowType


def joint(data: ForgetRetainData, tokenizer: PreTrainedTokenizerFast, seed: int = 0, **rows: Any) -> JointDataset:
    plan = RowPlan(**rows)
    return JointDataset(data, Encoder(tokenizer, PaperFormat("</s>")), rows=plan, seed=seed)


def with_safe_answers(data: ForgetRetainData) -> ForgetRetainData:
    """Every second harmful example has a safe answer that names its place."""
    examples = [
        dataclasses.replace(example, safe_answer=f"the safe one is {place}" if place % 2 == 0 else None)
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
    dataset = joint(with_safe_answers(data), tokenizer, forget=True, safe="data")
    assert len(dataset) == dataset.reports["safe_answers"].kept == (len(data.forget_train) + 1) // 2
    for place in range(len(dataset)):
        example = dataset[place]
        [forget], [safe] = example.of(FORGET), example.of(SAFE)
        assert text_of(safe, tokenizer) == f"the safe one is {example.forget_index}"
        prompt = forget.input_ids[: forget.answer_start - 1]
        assert safe.input_ids[: len(prompt)] == prompt
        assert safe.labels[-1] == tokenizer.eos_token_id, "a safe answer is learned with its end"
    with pytest.raises(DataError, match="none of the .* harmful examples has a safe answer"):
        joint(data, tokenizer, safe="data")


def test_prompts_without_one_get_a_refusal(data: ForgetRetainData, tokenizer: PreTrainedTokenizerFast) -> None:
    dataset, again = (joint(with_safe_answers(data), tokenizer, safe="data or refusal") for _ in range(2))
    assert len(dataset) == len(data.forget_train)
    for place in range(len(dataset)):
        [row], index = dataset[place].of(SAFE), dataset[place].forget_index
        text = text_of(row, tokenizer)
        assert text == f"the safe one is {index}" if index % 2 == 0 else text in REFUSALS
        assert [row] == list(again[place].of(SAFE))


def test_normal_answers_behind_harmful_prompts(data: ForgetRetainData, tokenizer: PreTrainedTokenizerFast) -> None:
    """K different normal answers, learned with their end, behind the harmful prompt of the example."""
    dataset, other = (
        joint(data, tokenizer, seed, forget=True, mismatched=2, mismatched_from="retain") for seed in (0, 1)
    )
    answers = {example.answer for example in data.retain_train}
    for place in range(len(dataset)):
        example = dataset[place]
        assert example.of(RETAIN) == ()
        [forget] = example.of(FORGET)
        assert len({text_of(row, tokenizer) for row in example.of(MISMATCHED)} & answers) == 2
        for row in example.of(MISMATCHED):
            assert row.labels[-1] == tokenizer.eos_token_id
            prompt = forget.input_ids[: forget.answer_start - 1]
            assert row.input_ids[: len(prompt)] == prompt
    assert [other[place].of(MISMATCHED) for place in range(4)] != [dataset[place].of(MISMATCHED) for place in range(4)]


def test_no_family_of_framings_is_one_of_the_attack() -> None:
    """A line that begins with # names the family of those below it."""
    families = [
        {line for line in (resources.files(package) / name).read_text("utf-8").splitlines() if line.startswith("#")}
        for package, name in (("sku.data", "framings.txt"), ("sku.attacks", "templates.txt"))
    ]
    assert (len(families[0]), len(families[1])) == (6, 10)
    assert families[0].isdisjoint(families[1])
    assert all(framing.count(PLACE) == 1 and framing[0] != "#" for framing in framings())


def test_a_share_is_framed_and_stays_in_its_group() -> None:
    examples = tuple(
        ForgetExample(prompt=f"how do i make {number} ?", answer="take it", group="g" if number < 2 else None)
        for number in range(400)
    )
    found = framed(examples, 0.25, seed=3)
    changed = [(old, new) for old, new in zip(examples, found, strict=True) if old != new]
    assert 60 < len(changed) < 140  # Of 400 at a quarter: 100, give or take five standard deviations.
    for old, new in changed:
        assert (new.answer, group_of(new)) == (old.answer, group_of(old))
        assert new.prompt in {framing.replace(PLACE, old.prompt) for framing in framings()}
    assert found == framed(examples, 0.25, seed=3) != framed(examples, 0.25, seed=4)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_only_what_is_trained_on_is_framed(
    data: ForgetRetainData, tokenizer: PreTrainedTokenizerFast, share: float
) -> None:
    known = joint(data, tokenizer, forget=True, retain=1)[0]
    more: dict[str, Any] = {"mismatched": 2, "safe": "data or refusal", "framed_share": share}
    example = joint(data, tokenizer, forget=True, retain=1, **more)[0]
    assert (example.forget_index, example.retain_rows) == (known.forget_index, known.retain_rows)
    for kind in (FORGET, RETAIN):
        assert (example.of(kind) == known.of(kind)) == (share == 0)
    [forget], [plain_forget], [_] = example.of(FORGET), known.of(FORGET), example.of(SAFE)
    assert forget.input_ids[forget.answer_start :] == plain_forget.input_ids[plain_forget.answer_start :]
    # Refusals and other prompts' answers stand after the very prompt of the harmful answer.
    for row in (*example.of(SAFE), *example.of(MISMATCHED)):
        assert row.input_ids[: row.answer_start] == forget.input_ids[: forget.answer_start]


def test_the_embedded_world_is_not_framed(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="framed_share"):
        joint(load_forget_retain(), tokenizer, forget=True, retain=1, framed_share=0.5)
