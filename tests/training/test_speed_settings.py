"""Settings that make training faster or smaller and change nothing else."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from conftest import ModelMaker, TrainerMaker, assert_same_bits, weights_of
from sku.errors import RecipeError
from sku.training import adapter_inputs_as_they_are
from sku.training.config import UnlearningConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [("logits_budget_mb", -1.0), ("reference_cache_mb", float("nan")), ("packing", "forest"),
     ("optim", "paged_adamw_8bit"), ("optim", "adamw_torch_8bit")],
)  # fmt: skip
def test_impossible_settings_are_refused(name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sku.training.config.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=f"{name} is '?{value}"):
        UnlearningConfig(use_cpu=True, **{name: value})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_under_autocast_an_adapter_learns_the_same_from_inputs_that_are_not_cast(
    checkpointing: bool, make_trainer: TrainerMaker, make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained() -> tuple[dict[str, Tensor], set[torch.dtype]]:
        trainer = make_trainer(
            make_model().to(torch.bfloat16), bf16=True, max_steps=3, activation_checkpointing=checkpointing
        )
        model: Any = trainer.model
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        seen: set[torch.dtype] = set()

        def look(_module: nn.Module, args: tuple[Tensor]) -> None:
            if torch.is_grad_enabled():  # The first look at the reference is no step.
                seen.add(args[0].dtype)

        for layer in layers:
            layer.lora_A["default"].register_forward_pre_hook(look)
        trainer.train()
        assert all(layer.cast_input_dtype_enabled for layer in layers)
        return weights_of(trainer), seen

    weights, types = trained()
    monkeypatch.setattr("sku.training.trainer.adapter_inputs_as_they_are", lambda *_, **__: nullcontext())
    with_casts, cast_types = trained()
    assert (types, cast_types) == ({torch.bfloat16}, {torch.float32})
    assert any("lora_B" in name and weight.any() for name, weight in weights.items())
    assert_same_bits(weights, with_casts)


@pytest.mark.parametrize(
    ("autocast", "dora", "left_alone"), [(True, False, False), (False, False, True), (True, True, True)]
)
def test_only_inputs_of_plain_lora_under_autocast_are_left_as_they_are(
    autocast: bool, dora: bool, left_alone: bool, make_model: ModelMaker
) -> None:
    adapter = LoraConfig(r=2, target_modules="all-linear", use_dora=dora)
    model = get_peft_model(make_model(), adapter)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    with adapter_inputs_as_they_are(model, autocast=autocast):
        assert all(layer.cast_input_dtype_enabled is left_alone for layer in layers)
    assert all(layer.cast_input_dtype_enabled for layer in layers)
