"""Losses of fixed text and divergences on it against values worked out by hand; the base model's view of replies."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sku.config import EvaluateConfig, PromptFormatName
from sku.data.examples import ForgetRetainData, RetainExample
from sku.data.tokens import IGNORE_INDEX, TokenizedExample, resolve_prompt_format
from sku.errors import EvaluationError
from sku.evaluate import perplexity
from sku.evaluate.generation import Progress
from sku.evaluate.generation.prompts import PromptEncoder
from sku.evaluate.perplexity import (
    SHUFFLES,
    ScoredText,
    compare_distributions,
    in_orders,
    score_examples,
    score_fluency,
)
from sku.evaluate.records import AGREEMENT_FILE, AgreementRow, Split, read_rows
from sku.evaluate.results import read_result
from sku.evaluate.run import evaluate
from sku.evaluate.utility import base_agreement

from .conftest import RecordMaker

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def example(prompt: list[int], answer: list[int]) -> TokenizedExample:
    return TokenizedExample(
        input_ids=(*prompt, *answer), labels=(*[IGNORE_INDEX] * len(prompt), *answer), answer_start=len(prompt)
    )


def text(name: str, prompt: list[int], answer: list[int], split: Split = "retain_test") -> ScoredText:
    return ScoredText(id=name, split=split, tokens=example(prompt, answer))


TEXTS = [
    text("a", [5, 6, 7, 8, 9, 10], [11]),
    text("b", [5], [12, 13, 14, 15]),
    text("c", [20, 21], [22, 23], "normal:benign"),
    text("d", [30, 31, 32], [33, 34, 35, 36, 37, 38, 39]),
]
EXAMPLES = [one.tokens for one in TEXTS]


@pytest.fixture
def other_model(tiny_model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same model with every weight a little different."""
    changed = copy.deepcopy(tiny_model)
    generator = torch.Generator().manual_seed(1)
    for weight in changed.parameters():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    return changed


def log_shares(model: LlamaForCausalLM, tokenized: TokenizedExample) -> Tensor:
    """``[N, V]``: what a model says at each labelled token, alone, without padding, in float64."""
    places = [place - 1 for place, label in enumerate(tokenized.labels) if label != IGNORE_INDEX]
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([tokenized.input_ids])).logits[0]
    return logits.double().log_softmax(-1)[places]


def loss_by_hand(model: LlamaForCausalLM, tokenized: TokenizedExample) -> float:
    labels = [label for label in tokenized.labels if label != IGNORE_INDEX]
    return -float(log_shares(model, tokenized).gather(-1, torch.tensor(labels)[:, None]).sum())


@pytest.mark.parametrize("batch_size", [1, 4])
def test_losses_and_divergences_are_those_of_each_text_alone(
    tiny_model: LlamaForCausalLM, other_model: LlamaForCausalLM, batch_size: int
) -> None:
    scores = score_examples(tiny_model, EXAMPLES, batch_size=batch_size)
    assert [tokens for _, tokens in scores] == [1, 4, 2, 7]
    expected = [loss_by_hand(tiny_model, entry) for entry in EXAMPLES]
    assert [nll for nll, _ in scores] == pytest.approx(expected, rel=1e-5)
    rows = compare_distributions(tiny_model, other_model, TEXTS, batch_size=batch_size)
    assert [(row.id, row.split, row.tokens) for row in rows] == [
        (one.id, one.split, tokens) for one, (_, tokens) in zip(TEXTS, scores, strict=True)
    ]
    for row, one in zip(rows, EXAMPLES, strict=True):
        log_p, log_q = (log_shares(model, one) for model in (tiny_model, other_model))
        assert row.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), rel=1e-4)
        assert row.matches == int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    assert 0 < sum(row.matches for row in rows) < sum(row.tokens for row in rows)


def test_models_that_can_not_be_measured_are_refused(
    tiny_model: LlamaForCausalLM, other_model: LlamaForCausalLM
) -> None:
    smaller = copy.deepcopy(tiny_model)
    smaller.resize_token_embeddings(200)
    with pytest.raises(EvaluationError, match=r"258.*200"):
        compare_distributions(tiny_model, smaller, TEXTS, batch_size=2)
    other_model.lm_head.weight.data[3] = math.nan
    with pytest.raises(EvaluationError, match="nan"):
        compare_distributions(tiny_model, other_model, TEXTS, batch_size=2)
    with pytest.raises(EvaluationError, match="nan"):
        score_examples(other_model, EXAMPLES, batch_size=4)


def test_mean_divergences_are_per_token_and_intervals_over_examples() -> None:
    rows = [
        AgreementRow(id="a", split="retain_test", kl=3.0, matches=1, tokens=2),
        AgreementRow(id="b", split="retain_test", kl=1.0, matches=6, tokens=6),
        AgreementRow(id="c", split="normal:benign", kl=0.5, matches=0, tokens=1),
    ]
    found = base_agreement(rows, seed=0)
    normal = found["retain_test"]
    assert (normal.kl, normal.top1, normal.tokens, normal.examples) == (4 / 8, 7 / 8, 8, 2)
    # Two examples: each drawn twice is the extreme, and more frequent than 2.5 %.
    assert (normal.kl_low, normal.kl_high) == pytest.approx((1 / 6, 3 / 2))
    assert (normal.top1_low, normal.top1_high) == pytest.approx((1 / 2, 1))
    benign = found["normal:benign"]
    assert (benign.kl, benign.kl_low, benign.kl_high, benign.top1) == (0.5, 0.5, 0.5, 0)


CONFIG = EvaluateConfig(prompts=2, retain_prompts=3, batch_size=3, max_new_tokens=4, prefill_tokens=())


def test_an_evaluation_compares_the_models_on_normal_answers(
    tiny_model: LlamaForCausalLM, other_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_data: ForgetRetainData, tmp_path: Path,
) -> None:  # fmt: skip
    data = dataclasses.replace(tiny_data, normal={"benign": (RetainExample(prompt="tell", answer="it is so"),)})

    def again(base: LlamaForCausalLM, folder: Path | None = None) -> Any:
        return evaluate(other_model, tiny_tokenizer, data, config=CONFIG, base_model=base, output_dir=folder)

    assert again(other_model).agreement == {}
    found = again(tiny_model, tmp_path)
    assert list(found.agreement) == ["retain_test", "normal:benign"]
    assert found.agreement["retain_test"].kl > 0
    assert found.agreement["retain_test"].tokens == found.perplexity["retain_test"].tokens
    assert read_result(tmp_path) == found
    _, rows = read_rows(tmp_path / AGREEMENT_FILE, AgreementRow)
    assert {row.id for row in rows} < {loss.id for loss in found.losses}
    tiny_model.lm_head.weight.data.mul_(0.99)
    assert again(tiny_model, tmp_path).agreement != found.agreement, "another base: made anew"
    for same in again(copy.deepcopy(other_model)).agreement.values():
        assert (same.kl, same.kl_high, same.top1, same.top1_low) == (0.0, 0.0, 1.0, 1.0)


def test_orders_keep_the_words_and_begin_with_their_own() -> None:
    words = " one two  three\nfour five six"
    orders = in_orders(words, "seed")
    assert orders[0] == " one two three four five six"
    assert len(orders) == SHUFFLES + 1
    assert all(order.startswith(" ") and Counter(order.split()) == Counter(words.split()) for order in orders)
    assert orders[0] not in orders[1:]
    assert in_orders(words, "seed") == orders != in_orders(words, "other")
    assert [in_orders(short, "seed") for short in ("", "one two three four", "one one one one one one")] == [[]] * 3


def test_fluency_is_the_loss_of_the_reply_alone_after_its_prefill(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, make_record: RecordMaker
) -> None:
    """A word that the prefill breaks off in keeps its place."""

    def tokenize(prompt: str, start: str, reply: str) -> TokenizedExample:
        return example(tiny_tokenizer(prompt + start).input_ids, tiny_tokenizer(reply).input_ids)

    words = " two three four five six"
    records = [
        make_record(words[1:], id="long", num_tokens=23),
        make_record("too short", id="short"),
        make_record(words, id="prefill", kind="prefill", prefill="one", num_tokens=24),
        make_record(f"ty{words}", id="broken off", kind="prefill", prefill="one twen", num_tokens=26),
    ]
    found = score_fluency(tiny_model, records, tokenize, seed=0, batch_size=3)
    assert [(row.id, row.tokens) for row in found] == [("long", 23), ("prefill", 24), ("broken off", 26)]
    for row, (start, reply) in zip(found, (("", words[1:]), ("one", words), ("one twenty", words)), strict=True):
        orders = in_orders(reply, f"0/{row.id}")
        expected = [loss_by_hand(tiny_model, tokenize(records[0].prompt, start, order)) for order in orders]
        assert [row.nll, *row.shuffled_nlls] == pytest.approx(expected, rel=1e-5)


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
        tiny_model, records, tokenize, seed=0, batch_size=3, progress=lambda done, total: told.append((done, total))
    )
    assert [record.shuffled_nlls for record in found] == [(), (100.0,), (100.0, 70.0, 80.0)]
    assert asked == [3, 2, 2]
    assert told == [(3, 3), (5, 5), (7, 7)]


@pytest.mark.parametrize(
    ("format_name", "start", "reply"), [("paper", "", "boil it"), ("chat", "take vor", "nite and boil")]
)
def test_the_replys_own_tokens_are_labelled_and_no_other(
    tiny_tokenizer: PreTrainedTokenizerFast, format_name: PromptFormatName, start: str, reply: str
) -> None:
    """The tokenizer has a token a byte, so the labels can be read back."""
    tiny_tokenizer.chat_template = CHAT_TEMPLATE
    encoder = PromptEncoder(tiny_tokenizer, resolve_prompt_format(format_name, tiny_tokenizer), 256, 256, 256)
    found = encoder.scored_reply("what is it ?", start, reply)
    assert found is not None
    assert found.input_ids == encoder.scored("what is it ?", start + reply).input_ids  # type: ignore[union-attr]
    labelled = [label for label in found.labels if label != IGNORE_INDEX]
    assert str(tiny_tokenizer.decode(labelled)).lstrip() == reply.lstrip()
    assert found.labels[-len(labelled) :] == tuple(labelled)
    assert encoder.scored_reply("what is it ?", "take vornite", "  ") is None
