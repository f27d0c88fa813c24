"""The other backends say what ``generate`` says, and a model is left as it was."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sku.config import EvaluateConfig
from sku.data.examples import ForgetExample, ForgetRetainData, RetainExample
from sku.errors import EvaluationError
from sku.evaluate.comparison import compare
from sku.evaluate.generation.backends import ROOM, PreallocatedCacheLayer, generate_replies, give_room
from sku.evaluate.generation.decoding import GenerationRequest, RowSampler, Sampling, keep_top_p
from sku.evaluate.records import GenerationRecord
from sku.evaluate.results import read_result
from sku.evaluate.run import evaluate

CONFIG = EvaluateConfig(
    prompts=10, retain_prompts=10, batch_size=4, max_new_tokens=8, prefill_tokens=(3, "affirmative"), samples=2
)


@pytest.fixture
def data() -> ForgetRetainData:
    return ForgetRetainData(
        forget_train=tuple(ForgetExample(prompt=f"do thing {n}", answer=f"first take {n}") for n in range(6)),
        forget_test=tuple(ForgetExample(prompt=f"do other {n}", answer=f"then take {n}") for n in range(3)),
        retain_train=(),
        retain_validation=(),
        retain_test=tuple(RetainExample(prompt=f"say {n}", answer=f"{n} it is") for n in range(4)),
    )


def stand_in_vllm() -> types.ModuleType:
    """Its interface on a real model read from the folder: vLLM itself can't be installed beside this transformers."""
    module = types.ModuleType("vllm")

    class SamplingParams:
        def __init__(
            self, *, temperature: float = 1.0, top_p: float = 1.0, seed: int | None = None, max_tokens: int = 16,
            stop_token_ids: list[int] | None = None, detokenize: bool = True,
        ) -> None:  # fmt: skip
            assert not detokenize
            self.temperature, self.top_p, self.seed = temperature, top_p, seed
            self.max_tokens, self.stop_token_ids = max_tokens, stop_token_ids or []

    class LLM:
        def __init__(self, model: str, *, dtype: str, seed: int, generation_config: str) -> None:
            assert generation_config == "vllm"
            self._model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

        def generate(
            self, prompts: Sequence[dict[str, list[int]]], params: Sequence[SamplingParams], *, use_tqdm: bool
        ) -> list[Any]:
            return [self._answer(one["prompt_token_ids"], how) for one, how in zip(prompts, params, strict=True)]

        def _answer(self, prompt: list[int], params: SamplingParams) -> Any:
            generator = None if params.seed is None else torch.Generator().manual_seed(params.seed)
            new: list[int] = []
            reason = "length"
            while len(new) < params.max_tokens:
                with torch.no_grad():
                    scores = self._model(torch.tensor([prompt + new])).logits[0, -1]
                if params.temperature == 0:
                    word = int(scores.argmax())
                else:
                    shares = (scores / params.temperature).softmax(-1)
                    word = int(torch.multinomial(shares, 1, generator=generator))
                new.append(word)
                if word in params.stop_token_ids:
                    reason = "stop"
                    break
            completion = types.SimpleNamespace(token_ids=tuple(new), finish_reason=reason)
            return types.SimpleNamespace(outputs=[completion])

    module.__dict__.update(LLM=LLM, SamplingParams=SamplingParams)
    return module


def test_vllm_reads_the_model_from_its_folder(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    data: ForgetRetainData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", stand_in_vllm())
    folder = tmp_path / "model"
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    config = dataclasses.replace(CONFIG, backend="vllm")
    seen: set[str] = set()
    found = evaluate(
        folder, None, data, config=config, output_dir=tmp_path / "e", progress=lambda stage, *_: seen.add(stage)
    )
    assert seen == {"backend check", "replies", "samples", "prefill", "perplexity"}
    plain = evaluate(folder, None, data, config=CONFIG)
    assert found.replies == plain.replies
    assert read_result(tmp_path / "e") == found
    with pytest.raises(EvaluationError, match="differ in decoding"):
        compare(plain, found)
    assert found.setup.decoding["backend"] == "vllm"
    given = evaluate(tiny_model, tiny_tokenizer, data, config=config, model_source=folder, model_name=str(folder))
    assert given == found
    with pytest.raises(EvaluationError, match="vllm"):
        evaluate(tiny_model, tiny_tokenizer, data, config=config)
    # Another model's words are not taken for this one's.
    tiny_model.lm_head.weight.data.neg_()
    with pytest.raises(EvaluationError, match="vllm"):
        evaluate(tiny_model, tiny_tokenizer, data, config=config, model_source=folder)


def test_a_missing_vllm_is_said_in_one_line(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    data: ForgetRetainData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    config = dataclasses.replace(CONFIG, backend="vllm")
    with pytest.raises(EvaluationError, match="pip install vllm") as caught:
        evaluate(tiny_model, tiny_tokenizer, data, config=config, model_source=tmp_path)
    assert "\n" not in str(caught.value)


ROWS, HEADS, SIZE = 4, 2, 3


def drawn(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(ROWS, HEADS, tokens, SIZE, generator=torch.Generator().manual_seed(seed))


def begun(first: Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.update(first, -first)
    return layer


def test_tokens_are_appended_bit_for_bit_also_beyond_the_room() -> None:
    first = drawn(5)
    plain, roomy = begun(first), PreallocatedCacheLayer(begun(first))
    for number in range(2 * ROOM + 3):
        new = drawn(1, number)
        for mine, theirs in zip(roomy.update(new, -new), plain.update(new, -new), strict=True):
            assert torch.equal(mine, theirs)
    assert roomy.get_seq_length() == plain.get_seq_length() == 5 + 2 * ROOM + 3
    assert roomy.get_mask_sizes(1) == plain.get_mask_sizes(1)


def test_tokens_follow_the_rows_that_stay() -> None:
    first = drawn(5)
    plain, roomy = begun(first), PreallocatedCacheLayer(begun(first))
    kept: Any = torch.tensor([2, 0])
    new = drawn(1, 1)
    for layer in (plain, roomy):
        layer.update(new, -new)
        layer.reorder_cache(kept)
        layer.update(new[kept], -new[kept])
        layer.crop(-1)
        layer.update(2 * new[kept], -new[kept])
    assert plain.keys is not None
    assert roomy.keys is not None
    assert torch.equal(roomy.keys, plain.keys)
    assert torch.equal(roomy.values, plain.values)  # type: ignore[arg-type]


def test_layers_of_another_kind_stay() -> None:
    cache = DynamicCache()
    cache.layers = [
        begun(drawn(2)),
        DynamicSlidingWindowLayer(sliding_window=4),
        DynamicLayer(),
    ]
    give_room(cache)
    assert [type(layer) for layer in cache.layers] == [PreallocatedCacheLayer, DynamicSlidingWindowLayer, DynamicLayer]
    first = cache.layers[0]
    give_room(cache)
    assert cache.layers[0] is first


SHARES = [0.5, 0.3, 0.15, 0.05]
DRAWS = 6000


def counts(temperature: float, top_p: float) -> list[int]:
    """How often each word of a vocabulary of four is drawn_words, 3 words a row."""
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=0)
    seeds = [sampling.row_seed(f"r{index}") for index in range(DRAWS // 3)]
    sampler = RowSampler(seeds, sampling, torch.device("cpu"))
    scores = torch.tensor(SHARES).log().repeat(len(seeds), 1)
    words = torch.cat([sampler(torch.zeros(len(seeds), 1, dtype=torch.long), scores).argmax(-1) for _ in range(3)])
    return torch.bincount(words, minlength=4).tolist()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_words_are_drawn_from_the_softmax(temperature: float) -> None:
    powers = [share ** (1 / temperature) for share in SHARES]
    expected = [DRAWS * power / sum(powers) for power in powers]
    assert chisquare(counts(temperature, 1.0), expected).pvalue > 0.001


@pytest.mark.parametrize("top_p", [0.1, 0.999])
@pytest.mark.parametrize("sharpness", [0.0, 0.5, 8.0], ids=["flat", "broad", "sharp"])
def test_top_p_is_that_of_transformers_also_where_many_words_share_it(sharpness: float, top_p: float) -> None:
    # 5,000 words: broad scores need more of them than are looked at first.
    scores = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)) * sharpness
    scores += torch.arange(5000) * 1e-4  # No two are equal, so that the two must agree on which are kept.
    expected = TopPLogitsWarper(top_p)(torch.zeros(3, 1, dtype=torch.long), scores.double())
    found = keep_top_p(scores.double(), top_p)
    assert torch.equal(found, expected)


def test_seeds_come_from_the_seed_and_the_request_alone() -> None:
    one, other = (Sampling(temperature=1, top_p=1, seed=seed) for seed in (0, 1))
    seeds = [sampling.row_seed(name) for sampling in (one, other) for name in ("a", "b")]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert one.row_seed("a") == Sampling(temperature=2, top_p=0.5, seed=0).row_seed("a")


def asked(tokenizer: PreTrainedTokenizerFast) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            id=f"unseen-sample{sample}-{prompt}", split="forget_test", kind="sample", category=None, prompt=prompt,
            reference="", prefill="", sample=sample, input_ids=tuple(tokenizer(prompt).input_ids),
        )
        for prompt, sample in itertools.product(("hi", "how are you ?", "go on : and on"), range(3))
    ]  # fmt: skip


def drawn_words(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, requests: list[GenerationRequest], **changes: Any
) -> list[GenerationRecord]:
    settings: dict[str, Any] = {
        "stop_ids": [1], "max_new_tokens": 10, "batch_size": 4, "sampling": Sampling(temperature=1, top_p=0.9, seed=3),
        **changes,
    }  # fmt: skip
    return generate_replies(model, tokenizer, requests, **settings)


def test_a_drawn_reply_does_not_depend_on_its_batch_or_on_global_randomness(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    requests = asked(tiny_tokenizer)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = drawn_words(tiny_model, tiny_tokenizer, requests)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    for batch_size in (1, 9):
        assert drawn_words(tiny_model, tiny_tokenizer, requests, batch_size=batch_size) == found
    assert drawn_words(tiny_model, tiny_tokenizer, requests[::-1]) == found[::-1]
    assert drawn_words(tiny_model, tiny_tokenizer, requests[4:5]) == found[4:5]
    assert [(record.kind, record.sample) for record in found[:3]] == [("sample", 0), ("sample", 1), ("sample", 2)]
    assert len({record.reply for record in found}) > 6
