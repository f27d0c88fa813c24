"""The other backends say what ``generate`` says, and a model is left as it was."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sku.config import EvaluateConfig
from sku.data.examples import ForgetExample, ForgetRetainData, RetainExample
from sku.errors import EvaluationError
from sku.evaluate.backends import CHECKED_PROMPTS, GenerateBackend, GenerationRequest, compare_replies
from sku.evaluate.backends.continuous import ContinuousBackend
from sku.evaluate.comparison import compare
from sku.evaluate.generation import generate_replies
from sku.evaluate.records import GenerationRecord
from sku.evaluate.results import read_result
from sku.evaluate.row_sampling import Drawing
from sku.evaluate.run import evaluate

from .conftest import RecordMaker

PROMPTS = [f"{word} {number} ?" for number in range(6) for word in ("hi", "how are you", "x y")]
CONFIG = EvaluateConfig(prompts=10, retain_prompts=10, batch_size=4, max_new_tokens=8, prefill_tokens=(3,), samples=2)

# transformers' continuous batching asks torch for a deprecated decorator on its first import.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")


@pytest.fixture
def data() -> ForgetRetainData:
    return ForgetRetainData(
        unlearned=tuple(ForgetExample(prompt=f"do thing {n}", answer=f"first take {n}") for n in range(6)),
        unseen=tuple(ForgetExample(prompt=f"do other {n}", answer=f"then take {n}") for n in range(3)),
        retain_train=(),
        retain_validation=(),
        retain_test=tuple(RetainExample(prompt=f"say {n}", answer=f"{n} it is") for n in range(4)),
    )


def requests(tokenizer: PreTrainedTokenizerFast) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            id=prompt, split="unseen", kind="reply", category=None, prompt=prompt, reference="", forced_start="",
            input_ids=tuple(tokenizer(prompt).input_ids),
        )
        for prompt in PROMPTS
    ]  # fmt: skip


def replies(model: Any, tokenizer: PreTrainedTokenizerFast, **options: Any) -> list[GenerationRecord]:
    settings: dict[str, Any] = {"stop_ids": [1, 184, 192], "max_new_tokens": 12, "batch_size": 4, **options}
    return generate_replies(model, tokenizer, requests(tokenizer), **settings)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_continuous_batching_says_the_same_and_puts_the_attention_back(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, attention: str
) -> None:
    tiny_model.set_attn_implementation(attention)
    plain = replies(tiny_model, tiny_tokenizer)
    assert {record.finished for record in plain} == {True, False}, "some replies end themselves"
    own = GenerationConfig(do_sample=True, repetition_penalty=50.0, eos_token_id=9)
    tiny_model.generation_config = own
    assert replies(tiny_model, tiny_tokenizer, backend=ContinuousBackend(tiny_model, 4)) == plain
    assert tiny_model.config._attn_implementation == attention
    assert tiny_model.generation_config is own
    assert replies(tiny_model, tiny_tokenizer) == plain


# PEFT 0.21 asks transformers 5.23 by an old name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_continuous_batching_answers_with_an_adapter(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    base = replies(tiny_model, tiny_tokenizer)
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model: Any = get_peft_model(tiny_model, adapter).eval()
    plain = replies(model, tiny_tokenizer)
    assert plain != base
    assert replies(model, tiny_tokenizer, backend=ContinuousBackend(model, 4)) == plain


def test_continuous_batching_does_not_draw(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    drawing = Drawing(temperature=1, top_p=1, seed=0)
    with pytest.raises(EvaluationError, match="draw samples with generate"):
        replies(tiny_model, tiny_tokenizer, backend=ContinuousBackend(tiny_model, 4), drawing=drawing)


def test_an_evaluation_by_another_backend_is_checked(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, data: ForgetRetainData, tmp_path: Path
) -> None:
    plain = evaluate(tiny_model, tiny_tokenizer, data, config=CONFIG)
    other = dataclasses.replace(CONFIG, backend="generate_batch")
    seen: set[str] = set()
    found = evaluate(
        tiny_model, tiny_tokenizer, data, config=other, output_dir=tmp_path, progress=lambda stage, *_: seen.add(stage)
    )
    assert found.outcomes == plain.outcomes
    assert (found.samples, found.leak) == (plain.samples, plain.leak)
    assert plain.setup.backend_check is None
    free = min(CHECKED_PROMPTS, sum(outcome.kind == "reply" for outcome in found.outcomes))
    assert found.setup.backend_check == {"prompts": free, "equal": free}
    assert any("drawn replies were written by the backend generate" in note for note in found.setup.notes)
    assert seen == {"backend check", "replies", "samples", "prefill", "perplexity"}
    assert read_result(tmp_path) == found
    assert evaluate(tiny_model, tiny_tokenizer, data, config=other, output_dir=tmp_path) == found
    with pytest.raises(EvaluationError, match="differ in decoding"):
        compare(plain, found)


def test_every_decoding_setting_is_recorded(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, data: ForgetRetainData
) -> None:
    config = dataclasses.replace(CONFIG, temperature=0.7, top_p=0.9)
    decoding = evaluate(tiny_model, tiny_tokenizer, data, config=config).setup.decoding
    shared = {"num_beams": 1, "max_new_tokens": 8, "eos_token_id": [1]}
    assert decoding == {
        **shared, "do_sample": False, "backend": "generate",
        "samples": {**shared, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "number": 2},
    }  # fmt: skip
    without = evaluate(tiny_model, tiny_tokenizer, data, config=dataclasses.replace(config, samples=0))
    assert without.setup.decoding["samples"] is None
    assert (without.samples, without.leak) == ({}, {})


def test_a_backend_that_says_something_else_is_refused(make_record: RecordMaker) -> None:
    plain = [make_record(f"reply {number}") for number in range(4)]
    mixed = [*plain[:2], make_record("other"), dataclasses.replace(plain[3], finished=False)]
    check = compare_replies("b", plain, mixed)
    assert (check.prompts, check.equal) == (4, 2)
    note = check.note("b")
    assert note is not None
    assert note.startswith("2 of 4 greedy replies of the backend b")
    assert compare_replies("b", plain, plain).note("b") is None
    with pytest.raises(EvaluationError, match="1 of 4 prompts only"):
        compare_replies("b", plain, [plain[0], plain[0], plain[0], plain[0]])


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
    found = evaluate(folder, None, data, config=config)
    plain = evaluate(folder, None, data, config=CONFIG)
    free = min(CHECKED_PROMPTS, sum(outcome.kind == "reply" for outcome in found.outcomes))
    assert found.setup.backend_check == {"prompts": free, "equal": free}
    assert found.replies == plain.replies
    assert found.setup.decoding["backend"] == "vllm"
    given = evaluate(tiny_model, tiny_tokenizer, data, config=config, model_source=folder, model_name=str(folder))
    assert given == found
    with pytest.raises(EvaluationError, match="in memory only: save it, then sku evaluate FOLDER"):
        evaluate(tiny_model, tiny_tokenizer, data, config=config)


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


def test_plain_generate_takes_a_batch_at_once(tiny_model: LlamaForCausalLM) -> None:
    assert GenerateBackend(tiny_model, 7).at_once == 7
    assert ContinuousBackend(tiny_model, 7).at_once == 16 * 7
