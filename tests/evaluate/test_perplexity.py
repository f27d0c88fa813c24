"""Losses of fixed text against losses worked out by hand, and the base model's view of replies."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sku.config import PromptFormatName
from sku.data.tokens import IGNORE_INDEX, TokenizedExample, resolve_prompt_format
from sku.errors import EvaluationError
from sku.evaluate import perplexity
from sku.evaluate.gate import is_word_salad
from sku.evaluate.generation.batching import Progress
from sku.evaluate.generation.prompts import PromptEncoder
from sku.evaluate.perplexity import SHUFFLES, in_orders, score_examples, score_fluency

from .conftest import RecordMaker

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


ASKED: dict[str, Any] = {"seed": 0, "batch_size": 8}


def example(prompt: list[int], answer: list[int]) -> TokenizedExample:
    return TokenizedExample(
        input_ids=(*prompt, *answer),
        labels=(*[IGNORE_INDEX] * len(prompt), *answer),
        answer_start=len(prompt),
    )


def plainly(tokenizer: PreTrainedTokenizerFast) -> Callable[[str, str, str], TokenizedExample]:
    def tokenize(prompt: str, start: str, reply: str) -> TokenizedExample:
        return example(tokenizer(prompt + start).input_ids, tokenizer(reply).input_ids)

    return tokenize


EXAMPLES = [
    example([5, 6, 7, 8, 9, 10], [11]),
    example([5], [12, 13, 14, 15]),
    example([20, 21], [22, 23]),
    example([30, 31, 32], [33, 34, 35, 36, 37, 38, 39]),
]


def by_hand(model: LlamaForCausalLM, tokenized: TokenizedExample) -> float:
    """Alone, without padding, one log-softmax per label."""
    with torch.no_grad():
        scores = model(torch.tensor([tokenized.input_ids])).logits[0].double().log_softmax(-1)
    labelled = [place for place, label in enumerate(tokenized.labels) if label != IGNORE_INDEX]
    return -sum(float(scores[place - 1, tokenized.labels[place]]) for place in labelled)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_losses_are_those_of_each_example_alone(tiny_model: LlamaForCausalLM, batch_size: int) -> None:
    scores = score_examples(tiny_model, EXAMPLES, batch_size=batch_size)
    assert [tokens for _, tokens in scores] == [1, 4, 2, 7]
    assert [nll for nll, _ in scores] == pytest.approx([by_hand(tiny_model, entry) for entry in EXAMPLES], rel=1e-5)


def test_a_broken_model_is_an_error(tiny_model: LlamaForCausalLM) -> None:
    tiny_model.lm_head.weight.data[3] = math.nan
    with pytest.raises(EvaluationError, match="is nan: its weights are broken"):
        score_examples(tiny_model, EXAMPLES, batch_size=4)


def test_orders_keep_the_words_and_begin_with_their_own() -> None:
    text = " one two  three\nfour five six"
    orders = in_orders(text, "seed")
    assert orders[0] == " one two three four five six"
    assert len(orders) == SHUFFLES + 1
    assert all(order.startswith(" ") for order in orders)
    assert all(Counter(order.split()) == Counter(text.split()) for order in orders)
    assert orders[0] not in orders[1:]
    assert in_orders(text, "seed") == orders
    assert in_orders(text, "other") != orders
    assert [in_orders(short, "seed") for short in ("", "one two three four", "one one one one one one")] == [[]] * 3


def test_fluency_is_the_loss_of_the_reply_alone_after_its_prefill(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, make_record: RecordMaker
) -> None:
    tokenize = plainly(tiny_tokenizer)
    records = [
        make_record("one two three four five", id="long", num_tokens=23),
        make_record("too short", id="short"),
        make_record(" two three four five six", id="prefill", kind="prefill", prefill="one", num_tokens=24),
    ]
    found = score_fluency(tiny_model, records, tokenize, seed=0, batch_size=3)
    assert [record.id for record in found] == ["long", "prefill"]
    assert [record.tokens for record in found] == [23, 24]
    assert [len(record.shuffled_nlls) for record in found] == [SHUFFLES, SHUFFLES]
    prompt = records[0].prompt
    for record, start, reply in zip(
        found, ["", "one"], ["one two three four five", " two three four five six"], strict=True
    ):
        assert record.nll == pytest.approx(by_hand(tiny_model, tokenize(prompt, start, reply)), rel=1e-5)
    expected = [
        by_hand(tiny_model, tokenize(prompt, "one", order))
        for order in in_orders(" two three four five six", "0/prefill")[1:]
    ]
    assert list(found[1].shuffled_nlls) == pytest.approx(expected, rel=1e-5)


def test_orders_are_asked_only_as_long_as_a_reply_is_doubtful(
    tiny_model: LlamaForCausalLM, make_record: RecordMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {
        "likely": [10.0, 1.0, 1.0, 1.0], "sure": [44.0, 100.0, 1.0, 2.0], "doubtful": [46.0, 100.0, 70.0, 80.0],
    }  # fmt: skip
    asked: list[int] = []
    told: list[tuple[int, int]] = []

    def score(_: LlamaForCausalLM, examples: list[TokenizedExample], *, progress: Progress, **__: Any) -> Any:
        asked.append(len(examples))
        progress(len(examples), len(examples))
        return [(list(losses.values())[row.input_ids[0]][row.input_ids[1]], 10) for row in examples]

    monkeypatch.setattr(perplexity, "score_examples", score)
    orders: Counter[str] = Counter()

    def tokenize(prompt: str, _: str, __: str) -> TokenizedExample:
        orders[prompt] += 1
        return example([int(prompt), orders[prompt] - 1], [0])

    records = [
        dataclasses.replace(make_record("one two three four five", id=name), prompt=str(number))
        for number, name in enumerate(losses)
    ]
    found = score_fluency(
        tiny_model,
        records,
        tokenize,
        seed=0,
        batch_size=3,
        progress=lambda done, total: told.append((done, total)),
    )
    assert [record.shuffled_nlls for record in found] == [(), (100.0,), (100.0, 70.0, 80.0)]
    assert [is_word_salad(record.nll, record.shuffled_nlls) for record in found] == [False, False, False]
    assert asked == [3, 2, 2]
    assert told == [(3, 3), (5, 5), (7, 7)]


def test_a_word_that_the_prefill_breaks_off_in_keeps_its_place(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, make_record: RecordMaker
) -> None:
    asked: list[tuple[str, str]] = []

    def tokenize(prompt: str, start: str, reply: str) -> TokenizedExample:
        asked.append((start, reply))
        return plainly(tiny_tokenizer)(prompt, start, reply)

    record = make_record("ty six two three four five", kind="prefill", prefill="one twen")
    assert len(score_fluency(tiny_model, [record], tokenize, **ASKED)) == 1
    assert {start for start, _ in asked} == {"one twenty"}
    assert len(asked) == SHUFFLES + 1
    assert asked[0][1] == " six two three four five"
    assert all(Counter(reply.split()) == Counter(asked[0][1].split()) for _, reply in asked)


@pytest.mark.parametrize("format_name", ["paper", "chat"])
@pytest.mark.parametrize(
    ("start", "reply", "own"),
    [
        ("", "boil it", "boil it"),
        ("take vornite and", " boil it in a jar .", " boil it in a jar ."),
        ("take vor", "nite and boil", "nite and boil"),
        ("take vornite", "  ", None),
    ],
)
def test_the_replys_own_tokens_are_labelled_and_no_other(
    tiny_tokenizer: PreTrainedTokenizerFast, format_name: PromptFormatName, start: str, reply: str, own: str | None
) -> None:
    """The tokenizer has a token a byte, so the labels can be read back."""
    tiny_tokenizer.chat_template = CHAT_TEMPLATE
    encoder = PromptEncoder(tiny_tokenizer, resolve_prompt_format(format_name, tiny_tokenizer), 256, 256, 256)
    found = encoder.scored_reply("what is it ?", start, reply)
    if own is None:
        assert found is None
        return
    assert found is not None
    assert found.input_ids == encoder.scored("what is it ?", start + reply).input_ids  # type: ignore[union-attr]
    labelled = [label for label in found.labels if label != IGNORE_INDEX]
    assert str(tiny_tokenizer.decode(labelled)).lstrip() == own.lstrip()
    assert found.labels[-len(labelled) :] == tuple(labelled)
