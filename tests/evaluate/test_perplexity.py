"""Losses of fixed text against losses worked out by hand, and the base model's view of replies."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sku.data.tokenization import TokenizedExample
from sku.errors import EvaluationError
from sku.evaluate import perplexity
from sku.evaluate.perplexity import SHUFFLES, in_orders, score_examples, score_fluency
from sku.losses import IGNORE_INDEX

from .conftest import RecordMaker


def example(prompt: list[int], answer: list[int]) -> TokenizedExample:
    return TokenizedExample(
        input_ids=(*prompt, *answer),
        labels=(*[IGNORE_INDEX] * len(prompt), *answer),
        answer_start=len(prompt),
    )


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


def test_a_model_that_knows_nothing_pays_log_vocabulary_for_each_token(tiny_model: LlamaForCausalLM) -> None:
    tiny_model.lm_head.weight.data.zero_()
    for nll, tokens in score_examples(tiny_model, EXAMPLES, batch_size=4):
        assert nll == pytest.approx(tokens * math.log(tiny_model.config.vocab_size))


def test_a_large_vocabulary_makes_batches_smaller_not_other(
    tiny_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = score_examples(tiny_model, EXAMPLES, batch_size=4)
    monkeypatch.setattr(perplexity, "MAX_LOGITS", 10 * tiny_model.config.vocab_size)
    done: list[tuple[int, int]] = []
    parts = score_examples(
        tiny_model, EXAMPLES, batch_size=4, progress=lambda count, total: done.append((count, total))
    )
    assert done == [(1, 4), (2, 4), (4, 4)]
    assert [nll for nll, _ in parts] == pytest.approx([nll for nll, _ in whole], rel=1e-5)


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


@pytest.mark.parametrize("text", ["", "one two three four", "one one one one one one"])
def test_texts_without_other_orders_are_not_shuffled(text: str) -> None:
    assert in_orders(text, "seed") == []


def test_fluency_is_the_loss_of_forced_start_and_reply(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, make_record: RecordMaker
) -> None:
    def tokenize(prompt: str, answer: str) -> TokenizedExample:
        return example(tiny_tokenizer(prompt).input_ids, tiny_tokenizer(answer).input_ids)

    records = [
        make_record("one two three four five", id="long", num_tokens=23),
        make_record("too short", id="short"),
        make_record(" two three four five six", id="forced", kind="prefill", forced_start="one", num_tokens=24),
    ]
    found = score_fluency(tiny_model, records, tokenize, seed=0, batch_size=3)
    assert [record.id for record in found] == ["long", "forced"]
    assert [record.tokens for record in found] == [23, 24]
    assert [len(record.shuffled_nlls) for record in found] == [SHUFFLES, SHUFFLES]
    prompt = records[0].prompt
    for record, whole in zip(found, ["one two three four five", "one two three four five six"], strict=True):
        assert record.nll == pytest.approx(by_hand(tiny_model, tokenize(prompt, whole)), rel=1e-5)
    expected = [
        by_hand(tiny_model, tokenize(prompt, "one" + order))
        for order in in_orders(" two three four five six", "0/forced")[1:]
    ]
    assert list(found[1].shuffled_nlls) == pytest.approx(expected, rel=1e-5)


def test_a_reply_of_which_nothing_fits_is_left_out(tiny_model: LlamaForCausalLM, make_record: RecordMaker) -> None:
    records = [make_record("one two three four five")]
    assert score_fluency(tiny_model, records, lambda _, __: None, seed=0, batch_size=3) == []
