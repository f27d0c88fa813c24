"""Stage 1 as one packed row: the losses and gradients of the padded batch, whatever the model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from conftest import ARCHITECTURES, VOCABULARY, ModelMaker, TrainerMaker, assert_same_bits, weights_of
from methods.conftest import assert_packed_is_padded
from sku.errors import ModelError
from sku.training.attention import choose_packing, why_not_packed
from sku.training.trainer import UnlearningTrainer


@pytest.mark.parametrize(("architecture", "full"), [*((name, False) for name in ARCHITECTURES), ("llama", True)])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")
def test_losses_and_gradients_are_those_of_the_padded_batch(
    architecture: str, full: bool, make_model: ModelMaker, make_trainer: TrainerMaker
) -> None:
    """fp32; Gemma's window of 16 is shorter than the rows."""
    trainer = make_trainer(
        make_model(architecture), full=full, preservation_mode="retention", packing="tree", reference_cache_mb=0.0
    )
    assert_packed_is_padded(trainer, ("tree", "flat"))


def test_equal_runs_are_equal_with_workers_and_with_recomputed_layers(make_trainer: TrainerMaker) -> None:
    def trained(**settings: Any) -> dict[str, Tensor]:
        trainer = make_trainer(packing="tree", max_steps=3, **settings)
        trainer.train()
        model: Any = trainer.model
        assert model.get_base_model().config._attn_implementation == "sdpa"
        return weights_of(trainer)

    first = trained()
    assert_same_bits(first, trained())
    assert_same_bits(first, trained(dataloader_num_workers=1))
    assert_same_bits(first, trained(activation_checkpointing=True))


SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": 2,
    "pad_token_id": 3,
}  # fmt: skip
HEADS: dict[str, Any] = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


REFUSED: dict[str, Callable[[], Any]] = {
    "MambaForCausalLM": lambda: MambaForCausalLM(MambaConfig(**SMALL, state_size=4, expand=2, conv_kernel=2)),
    "s_aux": lambda: GptOssForCausalLM(
        GptOssConfig(**SMALL, **HEADS, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"] * 2)
    ),
    "encoder-decoder": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_models_that_cannot_be_packed_are_padded_with_the_reason(
    reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = REFUSED[reason]().eval()
    before = model.config._attn_implementation
    with caplog.at_level(logging.WARNING, logger="sku"):
        assert choose_packing(model, "auto") == "padded"
    assert reason in caplog.text
    with pytest.raises(ModelError, match=reason):
        choose_packing(model, "tree")
    assert choose_packing(model, "padded") == "padded"
    assert model.config._attn_implementation == before


def test_layers_whose_window_is_not_told_are_refused(make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial row is shorter than a window; that the layers ask for it must be seen some other way."""
    model = make_model("gemma3")
    assert why_not_packed(model) is None
    for layer in model.model.layers:
        monkeypatch.setattr(layer.self_attn, "sliding_window", None)
    assert "what they see" in str(why_not_packed(model))


def test_the_trial_sees_positions_that_are_not_followed(
    make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that counts places in the row, not on the path."""
    model = make_model("opt", init_std=0.2)
    embed = model.model.decoder.embed_positions
    forward = embed.forward

    def by_place(attention_mask: Tensor, past: int = 0, position_ids: Any = None) -> Any:
        return forward(attention_mask, past, position_ids=torch.arange(attention_mask.shape[1])[None])

    monkeypatch.setattr(embed, "forward", by_place)
    assert "other scores" in str(why_not_packed(model))


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_packed_rows_go_with_the_kept_reference_and_without_the_head(full: bool, make_trainer: TrainerMaker) -> None:
    """Four steps with everything on that makes a step cheap are those of the plain way."""

    def trained(**settings: Any) -> tuple[UnlearningTrainer, list[float]]:
        # A small rate: what is compared is the arithmetic, not how training amplifies rounding.
        trainer = make_trainer(full=full, preservation_mode="retention", max_steps=4, learning_rate=1e-3, **settings)
        trainer.train()
        return trainer, [line["loss"] for line in trainer.state.log_history if "loss" in line]

    _, expected = trained(packing="padded", reference_cache_mb=0.0, logits_budget_mb=1e9)
    lean, found = trained(packing="tree", logits_budget_mb=0.0)
    assert lean._cache is not None
    assert lean._reference is None
    # Not the weights: Adam turns a gradient of rounding errors into a whole step.
    assert found == pytest.approx(expected, rel=1e-5)


def test_layers_that_are_no_plain_attention_are_refused(make_model: ModelMaker) -> None:
    """A chunk is longer than the trial row, so that it would not show there."""
    model = make_model("qwen3")
    model.config.layer_types = ["full_attention", "chunked_attention"]
    assert "chunked_attention" in str(why_not_packed(model))


def test_an_attention_that_was_asked_for_is_kept(make_model: ModelMaker, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(attn_implementation="eager")
    assert choose_packing(model, "auto") == "padded"
    assert "eager" in caplog.text
    assert choose_packing(model, "tree") == "tree"
