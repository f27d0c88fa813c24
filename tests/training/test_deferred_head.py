"""Training that never makes all scores at once, against training that does."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, PreTrainedConfig

from conftest import VOCABULARY, ModelMaker, TrainerMaker
from methods.conftest import disturb, terms_and_gradients
from sku.losses import HeadScores
from sku.methods.sku import TERMS
from sku.training.forward import DeferredHead

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 3, "bos_token_id": None, "eos_token_id": 2,
}  # fmt: skip


def built(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("architecture", ["llama_tied", "gemma2"])
def test_losses_and_gradients_are_those_of_all_scores_at_once(
    architecture: str, full: bool, make_model: ModelMaker, make_trainer: TrainerMaker
) -> None:
    """Tied and untied heads, with adapters and without: 0 MB leaves the head out always, a petabyte never."""
    results = []
    for budget in (0.0, 1e9):
        # A softcap so low that it bends the scores.
        capped = Gemma2Config(head_dim=8, final_logit_softcapping=1.0, **SMALL)
        model = built(capped) if architecture == "gemma2" else make_model(architecture)
        trainer = make_trainer(
            model, full=full, logits_budget_mb=budget, preservation_mode="retention",
            reference_cache_mb=0.0,
        )  # fmt: skip
        disturb(trainer)  # The copy stays what it was.
        terms, gradients = terms_and_gradients(trainer, "padded")
        results.append(terms | gradients)
    chunked, whole = results
    assert chunked.keys() == whole.keys() > set(TERMS)
    assert float(whole["preservation_divergence"].min()) > 1e-3
    for name, value in chunked.items():
        scale = max(float(whole[name].abs().max()), 1e-3)
        assert float((value - whole[name]).abs().max()) <= 2e-5 * scale, name


@pytest.mark.parametrize(
    ("config", "scale", "softcap"),
    [
        (CohereConfig(logit_scale=0.25, **SMALL), 0.25, None),
        (GraniteConfig(logits_scaling=8.0, **SMALL), 0.125, None),
        (Gemma2Config(head_dim=8, final_logit_softcapping=30.0, **SMALL), 1.0, 30.0),
    ],
    ids=["Cohere", "Granite", "Gemma 2"],
)
def test_what_a_model_does_to_its_scores_is_done(config: Any, scale: float, softcap: float | None) -> None:
    model = built(config)
    head = DeferredHead(model, 0.0)
    assert head.head is not None
    assert (head.head.scale, head.head.softcap) == (scale, softcap)
    ids = torch.tensor([[5, 40, 41, 200]])
    with torch.no_grad():
        scores = head.run(model, lambda: model(input_ids=ids)).logits
        assert isinstance(scores, HeadScores)
        torch.testing.assert_close(scores.logits(), model(input_ids=ids).logits, rtol=1e-5, atol=1e-6)


def test_a_head_that_does_something_unknown_is_not_left_out(
    make_model: ModelMaker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    plain = model.forward

    def shifted(**inputs: Any) -> Any:
        outputs = plain(**inputs)
        outputs.logits = outputs.logits + torch.arange(VOCABULARY)
        return outputs

    monkeypatch.setattr(model, "forward", shifted)
    with caplog.at_level(logging.WARNING):
        head = DeferredHead(model, 0.0)
    assert head.head is None
    assert "after the head" in caplog.text
    assert isinstance(head.run(model, lambda: model(input_ids=torch.tensor([[5]]))).logits, Tensor)


def test_the_budget_decides_by_the_number_of_positions(make_model: ModelMaker) -> None:
    """320 entries of 4 bytes are 1,280 bytes a position: 2**20 / 1280 = 819.2 positions fit into one MB."""
    model = make_model()
    head = DeferredHead(model, 1.0)
    for rows, made in ((819, True), (820, False)):
        ids = torch.full((rows, 1), 5)
        with torch.no_grad():
            outputs = head.run(model, functools.partial(model, input_ids=ids))
        assert isinstance(outputs.logits, Tensor) is made


def test_a_head_with_an_adapter_is_not_left_out(make_trainer: TrainerMaker) -> None:
    trainer = make_trainer(lora={"target_modules": ["lm_head", "q_proj"]}, logits_budget_mb=0.0)
    assert trainer._head.head is None
    assert trainer._cache is None
