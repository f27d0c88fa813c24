"""Drawn replies: from the right distribution, and each from its own request's seed alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TopPLogitsWarper

from sku.evaluate.generation import GenerationRequest, generate_replies
from sku.evaluate.records import GenerationRecord
from sku.evaluate.row_sampling import Drawing, RowSampler, keep_top_p

SHARES = [0.5, 0.3, 0.15, 0.05]
DRAWS = 6000


def counts(temperature: float, top_p: float) -> list[int]:
    """How often each word of a vocabulary of four is drawn, 3 words a row."""
    drawing = Drawing(temperature=temperature, top_p=top_p, seed=0)
    seeds = [drawing.row_seed(f"r{index}") for index in range(DRAWS // 3)]
    sampler = RowSampler(seeds, drawing, torch.device("cpu"))
    scores = torch.tensor(SHARES).log().repeat(len(seeds), 1)
    words = torch.cat([sampler(torch.zeros(len(seeds), 1, dtype=torch.long), scores).argmax(-1) for _ in range(3)])
    return torch.bincount(words, minlength=4).tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_words_are_drawn_from_the_softmax(temperature: float) -> None:
    powers = [share ** (1 / temperature) for share in SHARES]
    expected = [DRAWS * power / sum(powers) for power in powers]
    assert chisquare(counts(temperature, 1.0), expected).pvalue > 0.001


def test_the_test_tells_a_wrong_distribution() -> None:
    assert chisquare(counts(2.0, 1.0), [DRAWS * share for share in SHARES]).pvalue < 1e-9


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.7, 2), (0.81, 3), (0.99, 4)])
def test_top_p_keeps_the_likeliest_words_that_hold_its_share(top_p: float, kept: int) -> None:
    found = counts(1.0, top_p)
    assert found[kept:] == [0] * (4 - kept)
    expected = [DRAWS * share / sum(SHARES[:kept]) for share in SHARES[:kept]]
    assert kept == 1 or chisquare(found[:kept], expected).pvalue > 0.001


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("sharpness", [0.0, 0.5, 8.0], ids=["flat", "broad", "sharp"])
def test_top_p_is_that_of_transformers_also_where_many_words_share_it(sharpness: float, top_p: float) -> None:
    # 5,000 words: broad scores need more of them than are looked at first.
    scores = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)) * sharpness
    scores += torch.arange(5000) * 1e-4  # No two are equal, so that the two must agree on which are kept.
    expected = TopPLogitsWarper(top_p)(torch.zeros(3, 1, dtype=torch.long), scores.double())
    found = keep_top_p(scores.double(), top_p)
    assert torch.equal(found, expected)


def test_seeds_come_from_the_seed_and_the_request_alone() -> None:
    one, other = (Drawing(temperature=1, top_p=1, seed=seed) for seed in (0, 1))
    seeds = [drawing.row_seed(name) for drawing in (one, other) for name in ("a", "b")]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert one.row_seed("a") == Drawing(temperature=2, top_p=0.5, seed=0).row_seed("a")


def asked(tokenizer: PreTrainedTokenizerFast) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            id=f"unseen-sample{sample}-{prompt}", split="unseen", kind="sample", category=None, prompt=prompt,
            reference="", forced_start="", sample=sample, input_ids=tuple(tokenizer(prompt).input_ids),
        )
        for prompt, sample in itertools.product(("hi", "how are you ?", "go on : and on"), range(3))
    ]  # fmt: skip


def drawn(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, requests: list[GenerationRequest], **changes: Any
) -> list[GenerationRecord]:
    settings: dict[str, Any] = {
        "stop_ids": [1], "max_new_tokens": 10, "batch_size": 4, "drawing": Drawing(temperature=1, top_p=0.9, seed=3),
        **changes,
    }  # fmt: skip
    return generate_replies(model, tokenizer, requests, **settings)


def test_a_drawn_reply_does_not_depend_on_its_batch_or_on_global_randomness(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    requests = asked(tiny_tokenizer)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = drawn(tiny_model, tiny_tokenizer, requests)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    for batch_size in (1, 9):
        assert drawn(tiny_model, tiny_tokenizer, requests, batch_size=batch_size) == found
    assert drawn(tiny_model, tiny_tokenizer, requests[::-1]) == found[::-1]
    assert drawn(tiny_model, tiny_tokenizer, requests[4:5]) == found[4:5]
    assert [(record.kind, record.sample) for record in found[:3]] == [("sample", 0), ("sample", 1), ("sample", 2)]
    assert len({record.reply for record in found}) > 6


def test_seed_and_temperature_change_the_replies(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    requests = asked(tiny_tokenizer)
    found = drawn(tiny_model, tiny_tokenizer, requests)
    assert drawn(tiny_model, tiny_tokenizer, requests, drawing=Drawing(temperature=1, top_p=0.9, seed=4)) != found
    cold = drawn(tiny_model, tiny_tokenizer, requests, drawing=Drawing(temperature=1e-4, top_p=1, seed=3))
    assert cold == drawn(tiny_model, tiny_tokenizer, requests, drawing=None)
