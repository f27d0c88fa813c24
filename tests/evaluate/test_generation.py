"""Replies alone or in a batch, greedy or drawn, with every way to end; padded batches equal their rows one by one.

Some releases of transformers 5 got left padding wrong for Gemma 3 under SDPA. So what batches are compared with goes
through no cache, mask or position: a row alone is one plain forward pass over its own tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import chisquare
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    Lfm2Config,
    LlamaForCausalLM,
    MambaConfig,
    MptConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StaticCache,
    TopPLogitsWarper,
)

from conftest import ARCHITECTURES, VOCABULARY, ModelMaker
from sku.data.tokens import IGNORE_INDEX, TokenizedExample
from sku.errors import EvaluationError
from sku.evaluate.generation import writing
from sku.evaluate.generation.decoding import (
    Decoding,
    GenerationRequest,
    RowSampler,
    Sampling,
    keep_top_p,
    stop_token_ids,
)
from sku.evaluate.generation.writing import ReplyWriter, generate_replies, record_of_ids
from sku.evaluate.perplexity import answer_logits, answer_positions, score_examples
from sku.evaluate.records import GenerationRecord

PROMPTS = (
    "hi", "how are you today ?", "x", "what is two plus two , my friend ?", "tell me", "a b c", "why", "go on :",
)  # fmt: skip
STOP = [1]
SAMPLED = Sampling(temperature=1, top_p=0.9, seed=3)


def request(tokenizer: PreTrainedTokenizerFast, prompt: str, **changes: Any) -> GenerationRequest:
    fields: dict[str, Any] = {
        "id": prompt, "split": "forget_test", "kind": "reply", "category": "c", "prompt": prompt, "reference": "ref",
        "input_ids": tuple(tokenizer(prompt).input_ids),
    }  # fmt: skip
    return GenerationRequest(**{**fields, **changes})


def generate(model: Any, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> list[GenerationRecord]:
    settings: dict[str, Any] = {
        "requests": [request(tokenizer, prompt) for prompt in PROMPTS], "stop_ids": STOP, "max_new_tokens": 12,
        "batch_size": 8, **changes,
    }  # fmt: skip
    return generate_replies(model, tokenizer, **settings)


def _alone(model: PreTrainedModel, ids: Sequence[int], last: int) -> Tensor:
    """``[last, V]``: log-probabilities of what follows each of the last tokens of one row."""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([list(ids)]), use_cache=False, logits_to_keep=last).logits[0]
    return logits.float().log_softmax(-1)


def greedy_by_hand(model: LlamaForCausalLM, ids: list[int], stop_ids: list[int]) -> list[int]:
    """No padding, no cache: one forward pass per token."""
    new: list[int] = []
    for _ in range(12):
        token = int(_alone(model, [*ids, *new], 1).argmax())
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


# PEFT 0.21 asks transformers 5.23 by an old name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_model_answers_with_its_adapter_and_without_its_own_generation_settings(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = generate(tiny_model, tiny_tokenizer)
    own = GenerationConfig(
        do_sample=True, temperature=2.0, repetition_penalty=50.0, no_repeat_ngram_size=1, max_length=5, eos_token_id=9,
        suppress_tokens=list(range(2, 200)), forced_eos_token_id=1,
    )  # fmt: skip
    tiny_model.generation_config = own
    assert generate(tiny_model, tiny_tokenizer) == plain
    assert tiny_model.generation_config is own
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model, adapter).eval()
    assert generate(model, tiny_tokenizer) != plain
    with model.disable_adapter():
        assert generate(model, tiny_tokenizer) == plain
    assert tiny_model.generation_config.repetition_penalty == 50.0


def test_stop_ids_come_from_tokenizer_model_and_chat_format(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_model.generation_config.eos_token_id = [5, 7]
    assert stop_token_ids(tiny_model, tiny_tokenizer, [9]) == [1, 5, 7, 9]
    tiny_model.generation_config.eos_token_id = None
    tiny_tokenizer.eos_token = None
    assert stop_token_ids(tiny_model, tiny_tokenizer, [9]) == [9]
    with pytest.raises(EvaluationError, match="eos_token"):
        stop_token_ids(tiny_model, tiny_tokenizer)


def test_a_prefill_and_its_reply_join_without_a_seam_and_a_free_reply_loses_the_space_around_it(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tiny_tokenizer("say on : and").input_ids
    prefilled = request(tiny_tokenizer, "say", kind="prefill", prefill=" on : and", input_ids=tuple(ids))
    (record,) = generate(tiny_model, tiny_tokenizer, requests=[prefilled])
    whole = tiny_tokenizer.decode([*ids, *greedy_by_hand(tiny_model, ids, STOP)], skip_special_tokens=True)
    assert record.prompt + record.whole_reply == whole
    decoding = Decoding.of(tiny_tokenizer, STOP, max_new_tokens=12)
    said = [*tiny_tokenizer(" well \n").input_ids, *STOP, 5]
    asked = (request(tiny_tokenizer, "say"), prefilled)
    assert [record_of_ids(one, said, decoding, tiny_tokenizer).reply for one in asked] == ["well", " well \n"]


def test_a_reply_is_cut_where_its_prompt_leaves_no_more_room(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    lengths = [len(tiny_tokenizer(prompt).input_ids) for prompt in PROMPTS]
    whole = generate(tiny_model, tiny_tokenizer, stop_ids=[299])
    records = generate(tiny_model, tiny_tokenizer, stop_ids=[299], window=max(lengths) + 5)
    assert [record.num_tokens for record in records] == [min(12, max(lengths) + 5 - length) for length in lengths]
    assert all(long.reply.startswith(short.reply) for short, long in zip(records, whole, strict=True))


def _answers(model: Any, requests: list[GenerationRequest], decoding: Decoding) -> list[list[int]]:
    """Ids up to the one that ends a reply."""
    whole = ReplyWriter(model).answer(requests, decoding)
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


def _model(architecture: str, make_model: ModelMaker, spread: float = 0.6) -> Any:
    """Two layers whose scores lie apart, or a wrong mask would change little; OPT has no such setting.

    Beside the usual: convolutions with attention, a state alone, distances between places of the cache (ALiBi), and a
    window that is longer than all there is; Gemma 3's own is 16 tokens.
    """
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 320, "initializer_range": 0.6}
    peculiar: dict[str, Any] = {
        "mamba": MambaConfig(state_size=8, **sizes),
        "mpt": MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=256, vocab_size=320, initializer_range=0.6),
        "lfm2": Lfm2Config(
            intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
            layer_types=["conv", "full_attention"], **sizes,
        ),
    }  # fmt: skip
    if architecture in peculiar:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(peculiar[architecture]).eval()
    changes = {} if architecture == "opt" else {"initializer_range": spread}
    model = make_model(architecture.removeprefix("wide "), **changes)
    if architecture == "wide gemma3":
        model.config.sliding_window = 200
    return model


def _tokens_read(model: Any) -> list[tuple[int, int]]:
    """Grows by rows and tokens, padding included, of each forward pass from here on."""
    shapes: list[tuple[int, int]] = []

    def count(_model: Any, _args: Any, options: dict[str, Any]) -> None:
        shapes.append(tuple(options["input_ids"].shape))

    model.register_forward_pre_hook(count, with_kwargs=True)
    return shapes


@pytest.mark.parametrize(
    ("architecture", "sampling"), [("llama", SAMPLED), ("gemma3", None), ("lfm2", SAMPLED), ("mamba", None)]
)
def test_a_reply_that_ended_is_computed_no_more_and_the_others_are_the_same_bits(
    architecture: str,
    sampling: Sampling | None,
    make_model: ModelMaker,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = _model(architecture, make_model)
    requests = [request(tokenizer, prompt) for prompt in PROMPTS]
    stops = _ragged_stops(model, requests, sampling)
    decoding = Decoding(stop_ids=stops, max_new_tokens=24, pad_id=3, sampling=sampling)
    shapes = _tokens_read(model)
    with monkeypatch.context() as patched:
        patched.setattr(writing, "CHUNK", 10**6)
        whole = _answers(model, requests, decoding)
    together = sum(rows for rows, _ in shapes)
    shapes.clear()
    monkeypatch.setattr(writing, "CHUNK", 3)
    assert _answers(model, requests, decoding) == whole
    lengths = [len(ids) for ids in whole]
    assert min(lengths) + 6 < max(lengths), "the replies end at different places"
    if architecture != "mamba":  # Its state goes by another name, and all rows are computed until the last one ends.
        # No more than each reply's own steps, rounded up to whole chunks.
        assert sum(rows for rows, _ in shapes) <= sum(3 * -(-length // 3) for length in lengths) < together


@pytest.mark.parametrize(
    ("architecture", "sampling", "once"),
    [("llama", SAMPLED, True), ("wide gemma3", None, True), ("gemma3", None, False), ("lfm2", SAMPLED, False),
     ("mamba", None, False), ("mpt", None, False)],
)  # fmt: skip
def test_a_prompt_with_several_replies_is_read_once(
    architecture: str,
    sampling: Sampling | None,
    once: bool,
    make_model: ModelMaker,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each reply is that of its prompt alone: with nothing, one token and three more tokens after it, and sampled."""
    model = _model(architecture, make_model)
    more = [tokenizer(text).input_ids for text in ("", "go", "go on :", "")]
    requests = [
        request(tokenizer, prompt, id=f"{prompt}-{place}", input_ids=(*tokenizer(prompt).input_ids, *own))
        for place, own in enumerate(more)
        for prompt in PROMPTS[1:6:2]
    ]
    decoding = Decoding(stop_ids=(2,), max_new_tokens=24, pad_id=3, sampling=sampling)
    alone = [_answers(model, [one], decoding)[0] for one in requests]
    shapes = _tokens_read(model)
    monkeypatch.setattr(writing, "CHUNK", 5)
    assert _answers(model, requests, decoding) == alone
    tokens = [rows * length for rows, length in shapes]
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
    shapes = _tokens_read(tiny_model)
    assert _answers(tiny_model, requests, decoding) == alone
    assert shapes[0] == (4, len(beginning) + 9)


def test_a_model_whose_cache_can_not_leave_rows_out_answers_all_the_same(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = generate(tiny_model, tiny_tokenizer, sampling=SAMPLED)
    monkeypatch.setattr(writing, "CHUNK", 3)
    monkeypatch.setattr(writing, "Cache", StaticCache)  # Not what the model has.
    assert generate(tiny_model, tiny_tokenizer, sampling=SAMPLED) == plain


SHARES = [0.5, 0.3, 0.15, 0.05]
DRAWS = 6000


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_words_are_drawn_from_the_softmax(temperature: float) -> None:
    """Of a vocabulary of four, 3 words a row."""
    sampling = Sampling(temperature=temperature, top_p=1.0, seed=0)
    seeds = [sampling.row_seed(f"r{index}") for index in range(DRAWS // 3)]
    sampler = RowSampler(seeds, sampling, torch.device("cpu"))
    scores = torch.tensor(SHARES).log().repeat(len(seeds), 1)
    words = torch.cat([sampler(torch.zeros(len(seeds), 1, dtype=torch.long), scores).argmax(-1) for _ in range(3)])
    powers = [share ** (1 / temperature) for share in SHARES]
    expected = [DRAWS * power / sum(powers) for power in powers]
    assert chisquare(torch.bincount(words, minlength=4).tolist(), expected).pvalue > 0.001


@pytest.mark.parametrize(("sharpness", "top_p"), [(0.0, 0.1), (0.5, 0.999), (8.0, 0.999)])
def test_top_p_is_that_of_transformers_also_where_many_words_share_it(sharpness: float, top_p: float) -> None:
    # 5,000 words: broad scores need more of them than are looked at first.
    scores = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)) * sharpness
    scores += torch.arange(5000) * 1e-4  # No two are equal, so that the two must agree on which are kept.
    expected = TopPLogitsWarper(top_p)(torch.zeros(3, 1, dtype=torch.long), scores.double())
    assert torch.equal(keep_top_p(scores.double(), top_p), expected)


def test_a_drawn_reply_depends_on_the_seed_and_its_request_alone(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Not on its batch or on global randomness."""
    requests = [
        request(tiny_tokenizer, prompt, id=f"unseen-sample{sample}-{prompt}", kind="sample", sample=sample)
        for prompt, sample in itertools.product(("hi", "how are you ?", "go on : and on"), range(3))
    ]

    def drawn(requests: list[GenerationRequest], batch_size: int = 4, seed: int = 3) -> list[GenerationRecord]:
        sampling = Sampling(temperature=1, top_p=0.9, seed=seed)
        return generate(tiny_model, tiny_tokenizer, requests=requests, batch_size=batch_size, sampling=sampling)

    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = drawn(requests)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert [drawn(requests, batch_size=size) for size in (1, 9)] == [found, found]
    assert drawn(requests[::-1]) == found[::-1]
    assert drawn(requests[4:5]) == found[4:5]
    assert [(record.kind, record.sample) for record in found[:3]] == [("sample", 0), ("sample", 1), ("sample", 2)]
    assert len({record.reply for record in found}) > 6
    assert drawn(requests, seed=4) != found


TOLERANCE = 1e-4
"""Nats, of a log-probability."""
Rows = Sequence[tuple[int, ...]]


class Watching:
    """Stands in for ``RowSampler``: leaves the choice greedy and keeps each row's log-probabilities, step by step."""

    found: list[list[Tensor]]

    def __init__(self, seeds: Sequence[int], _sampling: Sampling, _device: torch.device) -> None:
        self._rows = list(range(len(seeds)))
        Watching.found = [[] for _ in seeds]

    def keep(self, places: Sequence[int]) -> None:
        self._rows = [self._rows[place] for place in places]

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        for row, scores_V in zip(self._rows, scores, strict=True):
            Watching.found[row].append(scores_V.float().log_softmax(-1))
        return scores


def _check_replies(model: PreTrainedModel, prompts: Rows, tokenizer: Any, starts: Rows = ((),)) -> None:
    """Each prompt with each start in one batch: what its replies share is read once; each token is the likeliest."""
    requests = [
        request(tokenizer, str(place), id=f"{place} {start}", input_ids=(*prompt, *start))
        for start in starts for place, prompt in enumerate(prompts)
    ]  # fmt: skip
    decoding = Decoding(stop_ids=(VOCABULARY - 1,), max_new_tokens=12, pad_id=3, sampling=SAMPLED)
    replies = ReplyWriter(model).answer(requests, decoding)
    for reply, found, asked in zip(replies, Watching.found, requests, strict=True):
        expected = _alone(model, (*asked.input_ids, *reply[:-1]), len(reply))
        assert expected.argmax(-1).tolist() == reply
        assert float((torch.stack(found)[: len(reply)] - expected).abs().max()) < TOLERANCE


def _check_scores(model: PreTrainedModel, rows: Rows) -> None:
    """Of the last tokens of all rows in one batch."""
    counts = [min(len(row) - 1, 3 + place) for place, row in enumerate(rows)]
    examples = [
        TokenizedExample(
            input_ids=row, labels=(*(IGNORE_INDEX,) * (len(row) - count), *row[-count:]), answer_start=len(row) - count
        )
        for row, count in zip(rows, counts, strict=True)
    ]
    _, kept_BT = answer_positions(examples, torch.device("cpu"))
    batched = answer_logits(model, examples, kept_BT).float().log_softmax(-1).split(counts)
    sums = score_examples(model, examples, batch_size=len(examples))
    for row, count, found, (nll, tokens) in zip(rows, counts, batched, sums, strict=True):
        expected = _alone(model, row, count + 1)[:-1]
        assert float((found - expected).abs().max()) < TOLERANCE
        own = -expected.gather(-1, torch.tensor(row[-count:])[:, None]).double().sum()
        assert tokens == count
        assert nll / count == pytest.approx(float(own) / count, abs=TOLERANCE)


STARTS: Rows = ((), (40,), (41, 42), (50, 51, 52, 53, 54))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "wide gemma3"])
def test_a_padded_batch_equals_its_rows(
    architecture: str, make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "CHUNK", 5)
    monkeypatch.setattr(writing, "RowSampler", Watching)
    model, generator = _model(architecture, make_model, 0.3), torch.Generator().manual_seed(0)
    prompts = [
        tuple(torch.randint(10, VOCABULARY - 10, (length,), generator=generator).tolist())
        for length in (2, 9, 40, 100, 17)
    ]
    _check_replies(model, prompts, tokenizer)
    _check_replies(model, prompts[2:4], tokenizer, STARTS)
    _check_replies(model, prompts[1:2], tokenizer, STARTS)
    _check_scores(model, prompts)
