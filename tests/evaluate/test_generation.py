"""Greedy replies on a tiny random Llama: alone or in a batch, with every way to end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    Lfm2Config,
    LlamaForCausalLM,
    MambaConfig,
    MptConfig,
    PreTrainedTokenizerFast,
    StaticCache,
)

from sku.errors import EvaluationError
from sku.evaluate.generation import backends, evaluation_mode
from sku.evaluate.generation.backends import GenerateBackend, generate_replies
from sku.evaluate.generation.decoding import Decoding, GenerationRequest, Sampling, stop_token_ids
from sku.evaluate.records import GenerationRecord

PROMPTS = (
    "hi",
    "how are you today ?",
    "x",
    "what is two plus two , my friend ?",
    "tell me",
    "a b c",
    "why",
    "go on :",
)
STOP = [1]
SAMPLED = Sampling(temperature=1, top_p=0.9, seed=3)


def request(tokenizer: PreTrainedTokenizerFast, prompt: str, **changes: Any) -> GenerationRequest:
    fields: dict[str, Any] = {
        "id": prompt, "split": "forget_test", "kind": "reply", "category": "c", "prompt": prompt, "reference": "ref",
        "prefill": "", "input_ids": tuple(tokenizer(prompt).input_ids),
    }  # fmt: skip
    return GenerationRequest(**{**fields, **changes})


def generate(
    model: Any, tokenizer: PreTrainedTokenizerFast, *, batch_size: int, stop_ids: list[int] | None = None, **kw: Any
) -> list[GenerationRecord]:
    requests = [request(tokenizer, prompt) for prompt in PROMPTS]
    return generate_replies(
        model, tokenizer, requests, stop_ids=stop_ids or STOP, max_new_tokens=12, batch_size=batch_size, **kw
    )


def greedy_by_hand(model: LlamaForCausalLM, ids: list[int], stop_ids: list[int]) -> list[int]:
    """No padding, no cache: one forward pass per token."""
    new: list[int] = []
    for _ in range(12):
        with torch.no_grad():
            token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token in stop_ids:
            break
        new.append(token)
    return new


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_replies_are_the_models_greedy_ones_whatever_the_batch(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    stops = [1, greedy_by_hand(tiny_model, tiny_tokenizer(PROMPTS[0]).input_ids, [])[4]]
    records = generate(tiny_model, tiny_tokenizer, batch_size=batch_size, stop_ids=stops)
    assert [record.id for record in records] == list(PROMPTS)
    for record, prompt in zip(records, PROMPTS, strict=True):
        new = greedy_by_hand(tiny_model, tiny_tokenizer(prompt).input_ids, stops)
        assert (record.num_tokens, record.finished) == (len(new), len(new) < 12)
        assert record.reply == str(tiny_tokenizer.decode(new, skip_special_tokens=True)).strip()
    assert len({record.reply for record in records}) > 1


def test_the_models_own_generation_settings_are_hidden_and_put_back(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = generate(tiny_model, tiny_tokenizer, batch_size=4)
    own = GenerationConfig(
        do_sample=True, temperature=2.0, repetition_penalty=50.0, no_repeat_ngram_size=1, max_length=5, eos_token_id=9,
        suppress_tokens=list(range(2, 200)), forced_eos_token_id=1,
    )  # fmt: skip
    tiny_model.generation_config = own
    assert generate(tiny_model, tiny_tokenizer, batch_size=4) == plain
    assert tiny_model.generation_config is own


# PEFT 0.21 asks transformers 5.23 by an old name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_an_adapter_model_answers_with_its_adapter(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = generate(tiny_model, tiny_tokenizer, batch_size=4)
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model, adapter).eval()
    tiny_model.generation_config.repetition_penalty = 50.0
    adapted = generate(model, tiny_tokenizer, batch_size=4)
    assert adapted != plain
    assert tiny_model.generation_config.repetition_penalty == 50.0
    with model.disable_adapter():
        assert generate(model, tiny_tokenizer, batch_size=4) == plain


def test_stop_ids_come_from_tokenizer_model_and_chat_format(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_model.generation_config.eos_token_id = [5, 7]
    assert stop_token_ids(tiny_model, tiny_tokenizer, [9]) == [1, 5, 7, 9]
    tiny_model.generation_config.eos_token_id = 5
    assert stop_token_ids(tiny_model, tiny_tokenizer) == [1, 5]
    tiny_model.generation_config.eos_token_id = None
    tiny_tokenizer.eos_token = None
    assert stop_token_ids(tiny_model, tiny_tokenizer, [9]) == [9]
    with pytest.raises(EvaluationError, match=r"set tokenizer\.eos_token"):
        stop_token_ids(tiny_model, tiny_tokenizer)


def test_a_prefill_and_its_reply_join_without_a_seam(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tiny_tokenizer("say on : and").input_ids
    prefilled = request(tiny_tokenizer, "say", kind="prefill", prefill=" on : and", input_ids=tuple(ids))
    (record,) = generate_replies(
        tiny_model, tiny_tokenizer, [prefilled], stop_ids=STOP, max_new_tokens=12, batch_size=1
    )
    whole = tiny_tokenizer.decode([*ids, *greedy_by_hand(tiny_model, ids, STOP)], skip_special_tokens=True)
    assert record.prompt + record.prefill + record.reply == whole


def test_only_a_free_reply_loses_the_space_around_it(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = torch.tensor([tiny_tokenizer(" well \n").input_ids + STOP])

    def say(**given: Any) -> SimpleNamespace:
        return SimpleNamespace(sequences=torch.cat([given["input_ids"], said], dim=1), past_key_values=None)

    monkeypatch.setattr(tiny_model, "generate", say)
    replies = []
    for kind in ("reply", "prefill"):
        asked = request(tiny_tokenizer, "say", kind=kind)
        records = generate_replies(tiny_model, tiny_tokenizer, [asked], stop_ids=STOP, max_new_tokens=12, batch_size=1)
        replies += [record.reply for record in records]
    assert replies == ["well", " well \n"]


def test_out_of_memory_halves_the_batch_and_says_so_once(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = generate(tiny_model, tiny_tokenizer, batch_size=8)
    real = cast(Any, tiny_model).generate
    sizes: list[int] = []

    def small_memory(**arguments: Any) -> Any:
        sizes.append(len(arguments["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(**arguments)

    monkeypatch.setattr(tiny_model, "generate", small_memory)
    done: list[tuple[int, int]] = []
    with caplog.at_level(logging.WARNING):
        found = generate(
            tiny_model, tiny_tokenizer, batch_size=8, progress=lambda count, total: done.append((count, total))
        )
    assert found == plain
    assert sizes == [8, 4, 2, 2, 2, 2]
    assert done == [(8, 8)]
    assert [record.message for record in caplog.records] == [
        "GPU memory ran out with 8 examples at once; going on with fewer"
    ]


def test_every_module_gets_its_mode_back(tiny_model: LlamaForCausalLM) -> None:
    tiny_model.train()
    tiny_model.lm_head.eval()

    def fail() -> None:
        with evaluation_mode(tiny_model):
            assert not any(module.training for module in tiny_model.modules())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert tiny_model.training
    assert tiny_model.model.layers[0].training
    assert not tiny_model.lm_head.training


def _answers(model: Any, requests: list[GenerationRequest], decoding: Decoding) -> list[list[int]]:
    """Ids up to the one that ends a reply."""
    whole = GenerateBackend(model, len(requests)).answer(requests, decoding)
    ends = [next((place + 1 for place, token in enumerate(ids) if token in decoding.stop_ids), None) for ids in whole]
    return [ids[:end] for ids, end in zip(whole, ends, strict=True)]


def _ragged_stops(model: Any, requests: list[GenerationRequest], sampling: Sampling | None) -> tuple[int, ...]:
    """Ids that end the replies at different places, some of them never."""
    free = _answers(model, requests, Decoding(stop_ids=(2,), max_new_tokens=24, pad_id=3, sampling=sampling))
    tokens = sorted({token for ids in free for token in ids})
    lengths = {
        token: {next((place // 3 for place, other in enumerate(ids) if other == token), 24) for ids in free}
        for token in tokens
    }
    return (2, max(tokens, key=lambda token: (len(lengths[token]), token)))


def _peculiar(architecture: str) -> Any:
    """Two layers: convolutions with attention, a state alone, or distances between places of the cache (ALiBi)."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 320, "initializer_range": 0.6}
    config: Any = MambaConfig(state_size=8, **sizes)
    if architecture == "mpt":
        config = MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=256, vocab_size=320, initializer_range=0.6)
    if architecture == "lfm2":
        config = Lfm2Config(
            intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
            layer_types=["conv", "full_attention"], **sizes,
        )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("architecture", "sampling"),
    [(name, None) for name in ("llama", "opt", "gemma3", "qwen3", "gpt2", "lfm2", "mamba")]
    + [(name, SAMPLED) for name in ("llama", "gemma3", "lfm2", "mamba")],
)
def test_a_reply_that_ended_is_computed_no_more_and_the_others_are_the_same_bits(
    architecture: str,
    sampling: Sampling | None,
    make_model: Callable[..., Any],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if architecture in ("lfm2", "mamba"):
        model = _peculiar(architecture)
    else:
        model = make_model(architecture, **{} if architecture == "opt" else {"initializer_range": 0.6})
    requests = [request(tokenizer, prompt) for prompt in PROMPTS]
    stops = _ragged_stops(model, requests, sampling)
    decoding = Decoding(stop_ids=stops, max_new_tokens=24, pad_id=3, sampling=sampling)
    rows: list[int] = []

    def count(_model: Any, _args: Any, options: dict[str, Any]) -> None:
        rows.append(len(options["input_ids"]))

    model.register_forward_pre_hook(count, with_kwargs=True)
    with monkeypatch.context() as patched:
        patched.setattr(backends, "CHUNK", 10**6)
        whole = _answers(model, requests, decoding)
    together, rows[:] = sum(rows), []
    monkeypatch.setattr(backends, "CHUNK", 3)
    assert _answers(model, requests, decoding) == whole
    lengths = [len(ids) for ids in whole]
    assert min(lengths) + 6 < max(lengths), "the replies end at different places"
    if architecture == "mamba":  # Its state goes by another name, and all rows are computed until the last one ends.
        return
    # No more than each reply's own steps, rounded up to whole chunks.
    assert sum(rows) <= sum(3 * -(-length // 3) for length in lengths) < together


def _tokens_read(model: Any) -> list[int]:
    """Grows by the number of tokens, padding included, of each forward pass from here on."""
    tokens: list[int] = []

    def count(_model: Any, _args: Any, options: dict[str, Any]) -> None:
        tokens.append(options["input_ids"].numel())

    model.register_forward_pre_hook(count, with_kwargs=True)
    return tokens


@pytest.mark.parametrize(
    ("architecture", "once"),
    [("llama", True), ("opt", True), ("qwen3", True), ("gpt2", True), ("wide gemma3", True), ("gemma3", False),
     ("lfm2", False), ("mamba", False), ("mpt", False)],
)  # fmt: skip
@pytest.mark.parametrize("sampling", [None, SAMPLED])
def test_a_prompt_with_several_replies_is_read_once(
    architecture: str,
    once: bool,
    sampling: Sampling | None,
    make_model: Callable[..., Any],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each reply is that of its prompt alone: with nothing, one token and three more tokens after it, and sampled."""
    if architecture in ("lfm2", "mamba", "mpt"):
        model = _peculiar(architecture)
    else:
        spread = {} if architecture == "opt" else {"initializer_range": 0.6}
        model = make_model(architecture.removeprefix("wide "), **spread)
        if architecture == "wide gemma3":
            model.config.sliding_window = 128
    more = [tokenizer(text).input_ids for text in ("", "go", "go on :", "")]
    requests = [
        request(tokenizer, prompt, id=f"{prompt}-{place}", input_ids=(*tokenizer(prompt).input_ids, *own))
        for place, own in enumerate(more)
        for prompt in PROMPTS[1:6:2]
    ]
    decoding = Decoding(stop_ids=(2,), max_new_tokens=24, pad_id=3, sampling=sampling)
    alone = [_answers(model, [one], decoding)[0] for one in requests]
    tokens = _tokens_read(model)
    monkeypatch.setattr(backends, "CHUNK", 5)
    assert _answers(model, requests, decoding) == alone
    whole = len(requests) * max(len(one.input_ids) for one in requests)
    assert (max(tokens) < whole / 2) is once
    assert (whole in tokens) is not once


@pytest.mark.parametrize("beginning", [[], [5, 6]])
def test_replies_with_little_in_common_are_read_whole(
    beginning: list[int], tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """One prompt behind several system prompts, say."""
    requests = [
        request(tiny_tokenizer, "x", id=str(first), input_ids=(*beginning, *range(first, first + 9)))
        for first in (10, 30, 50, 70)
    ]
    decoding = Decoding(stop_ids=(2,), max_new_tokens=4, pad_id=3)
    alone = [_answers(tiny_model, [one], decoding)[0] for one in requests]
    tokens = _tokens_read(tiny_model)
    assert _answers(tiny_model, requests, decoding) == alone
    assert tokens[0] == 4 * (len(beginning) + 9)


def test_a_model_whose_cache_can_not_leave_rows_out_answers_all_the_same(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request(tiny_tokenizer, prompt) for prompt in PROMPTS]
    backend = GenerateBackend(tiny_model, len(requests))
    for sampling in (None, Sampling(temperature=1, top_p=1, seed=0)):
        decoding = Decoding(stop_ids=(1,), max_new_tokens=12, pad_id=0, sampling=sampling)
        plain = GenerateBackend(tiny_model, len(requests)).answer(requests, decoding)
        with monkeypatch.context() as patched:
            patched.setattr(backends, "CHUNK", 3)
            patched.setattr(backends, "Cache", StaticCache)  # Not what the model has.
            assert backend.answer(requests, decoding) == plain


def test_a_reply_is_cut_where_its_prompt_leaves_no_more_room(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    lengths = [len(tiny_tokenizer(prompt).input_ids) for prompt in PROMPTS]
    unused = [299]
    for batch_size in (1, 8):
        records = generate(tiny_model, tiny_tokenizer, batch_size=batch_size, stop_ids=unused, window=max(lengths) + 5)
        expected = [min(12, max(lengths) + 5 - length) for length in lengths]
        assert [record.num_tokens for record in records] == expected
        assert min(expected) == 5
        whole = generate(tiny_model, tiny_tokenizer, batch_size=batch_size, stop_ids=unused)
        assert all(long.reply.startswith(short.reply) for short, long in zip(records, whole, strict=True))
