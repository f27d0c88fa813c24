"""Replies without a model land in the outcome that they are made for."""

from __future__ import annotations

import functools

import pytest

from evaluate.given_replies import REFUSAL, always_gibberish, always_refuse, evaluate_replies
from sku.config import EvaluateConfig
from sku.data.examples import ForgetRetainData
from sku.data.load import load_forget_retain
from sku.evaluate.asking import draw
from sku.evaluate.backends import GenerationRequest
from sku.evaluate.gate import is_refusal
from sku.evaluate.prefills import with_answers
from sku.evaluate.results import EvaluationResult
from sku.models import LoadedModel, load_model

FEW = EvaluateConfig(prompts=6, retain_prompts=8, max_new_tokens=8)


@pytest.fixture(scope="module")
def embedded() -> LoadedModel:
    return load_model("embedded")


@functools.cache
def world() -> ForgetRetainData:
    return load_forget_retain()


def measured(embedded: LoadedModel, kind: str, config: EvaluateConfig = FEW) -> EvaluationResult:
    data = world()
    reply = always_refuse(data) if kind == "refuse" else always_gibberish(0)
    starts = [*with_answers(draw(data, config, 0).harmful(), {}).values()]
    return evaluate_replies(
        kind, reply, embedded.tokenizer, data, base_model=embedded.model, config=config, starts=starts
    )


@pytest.mark.parametrize("judge", ["embedded", "refusal_rules"])
def test_always_refusing(embedded: LoadedModel, judge: str) -> None:
    """No harm and no gibberish, and not one normal prompt answered."""
    result = measured(embedded, "refuse", EvaluateConfig(prompts=6, retain_prompts=8, max_new_tokens=8, judge=judge))
    for split in ("forget_train", "forget_test"):
        assert result.replies[split]["refusal"].value == 1
        assert result.prefill[split]["1"]["harmful"].value == 0
    assert result.replies["retain_test"]["exact_answer"].value == 0
    assert result.perplexity == {}


def test_refusing_a_normal_prompt_is_over_refusal(embedded: LoadedModel) -> None:
    config = EvaluateConfig(prompts=6, retain_prompts=8, max_new_tokens=8, judge="refusal_rules")
    result = measured(embedded, "refuse", config)
    assert result.replies["retain_test"]["over_refusal"].value == 1


def test_other_data_is_refused_in_english(data: ForgetRetainData) -> None:
    request = GenerationRequest(
        id="a", split="forget_test", kind="reply", category=None, prompt="p", reference="r", prefill="", input_ids=(1,)
    )
    assert always_refuse(data)(request) == REFUSAL
    assert is_refusal(REFUSAL)


def test_always_gibberish(embedded: LoadedModel) -> None:
    """All of it is caught by the gate; without the gate the rules of refusal would call it harmful."""
    config = EvaluateConfig(prompts=6, retain_prompts=8, max_new_tokens=8, judge="refusal_rules")
    result = measured(embedded, "gibberish", config)
    assert result.replies["forget_test"]["gibberish"].value == 1
    assert result.replies["forget_test"]["harmful"].value == 0
    assert result.replies["forget_test"]["harmful_ungated"].value == 1
    assert result.replies["retain_test"]["gibberish"].value == 1


def test_gibberish_is_equal_for_equal_seeds(embedded: LoadedModel) -> None:
    first, again = (measured(embedded, "gibberish") for _ in range(2))
    assert first.outcomes == again.outcomes
