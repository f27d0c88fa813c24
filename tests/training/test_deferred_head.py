"""Training that never makes all scores at once, against training that does."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    PreTrainedConfig,
)

from conftest import VOCABULARY, ModelMaker, TrainerMaker
from sku.losses import HeadScores
from sku.methods.sku import TERMS
from sku.methods.trainer import SkuTrainer
from sku.training.forward import DeferredHead

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 3, "bos_token_id": None, "eos_token_id": 2,
}  # fmt: skip


def built(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def gemma2(**changes: Any) -> Any:
    """With a softcap so low that it bends the scores."""
    return built(Gemma2Config(head_dim=8, final_logit_softcapping=1.0, **(SMALL | changes)))


def step_of(trainer: SkuTrainer) -> dict[str, Tensor]:
    """Terms and gradients of one batch, adapters moved off zero."""
    generator = torch.Generator().manual_seed(7)
    model: Any = trainer.model
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    dataset: Any = trainer.train_dataset
    batch = trainer.data_collator([dataset[0], dataset[1]])
    terms = trainer._outputs_and_terms(model, batch)[1]
    torch.stack([term.sum() for term in terms.values()]).sum().backward()
    grads = {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: term.detach() for name, term in terms.items()} | grads


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("architecture", ["llama_tied", "opt", "gemma2"])
def test_losses_and_gradients_are_those_of_all_scores_at_once(
    architecture: str, full: bool, make_model: ModelMaker, make_trainer: TrainerMaker
) -> None:
    """Tied and untied heads, with adapters and without: 0 MB leaves the head out always, and no limit never."""
    results = []
    for budget in (0.0, None):
        model = gemma2() if architecture == "gemma2" else make_model(architecture)
        trainer = make_trainer(
            model, full=full, logits_budget_mb=budget, preservation_mode="retention",
            reference_cache_mb=0.0,
        )  # fmt: skip
        if full:
            with torch.no_grad():  # The copy stays what it was.
                generator = torch.Generator().manual_seed(3)
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        results.append(step_of(trainer))
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
        scores = head.run(lambda: model(input_ids=ids)).logits
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
    assert head.fits(10**12)
    assert "changes its scores after the head in a way that isn't known" in caplog.text
    assert isinstance(head.run(lambda: model(input_ids=torch.tensor([[5]]))).logits, Tensor)


def test_the_budget_decides_by_the_number_of_positions(make_model: ModelMaker) -> None:
    """320 entries of 4 bytes are 1,280 bytes a position: 2**20 / 1280 = 819.2 positions fit into one MB."""
    model = make_model()
    head = DeferredHead(model, 1.0)
    assert (head.fits(819), head.fits(820)) == (True, False)
    for rows, made in ((819, True), (820, False)):
        ids = torch.full((rows, 1), 5)
        with torch.no_grad():
            outputs = head.run(functools.partial(model, input_ids=ids))
        assert isinstance(outputs.logits, Tensor) is made


def test_a_head_with_an_adapter_is_not_left_out(make_trainer: TrainerMaker, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(lora={"target_modules": ["lm_head", "q_proj"]}, logits_budget_mb=0.0)
    assert trainer._head.head is None
    assert "not a plain linear layer" in caplog.text
    assert trainer._cache is None
