"""Settings that make training faster or smaller and change nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import TrainerMaker
from sku.acquire.trainer import SkuTrainer
from sku.errors import RecipeError
from sku.training import config as config_module
from sku.training import optimizer
from sku.training.config import UnlearningConfig


def weights_of(trainer: SkuTrainer) -> dict[str, Tensor]:
    assert trainer.model is not None
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


@pytest.mark.parametrize("pays", [True, False])
def test_bf16_auto_is_what_the_machine_can(pays: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(config_module, "bf16_pays", lambda *, use_cpu: pays)
    settings = UnlearningConfig(output_dir=str(tmp_path), use_cpu=True, bf16="auto")
    assert settings.bf16 is pays
    assert settings.mixed_precision == ("bf16" if pays else "no")


def test_bf16_pays_on_a_processor_with_units_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert config_module.bf16_pays(use_cpu=True) is False
    assert isinstance(config_module.bf16_pays(use_cpu=False), bool)


@pytest.mark.parametrize(
    ("optim", "package"),
    [("paged_adamw_8bit", "bitsandbytes"), ("adamw_bnb_8bit", "bitsandbytes"), ("adamw_torch_8bit", "torchao")],
)
def test_an_optimizer_whose_package_is_missing_is_refused(
    optim: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(optimizer, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=f"optim is {optim}, which needs the package {package}: pip install"):
        UnlearningConfig(output_dir=str(tmp_path), use_cpu=True, optim=optim)
    monkeypatch.setattr(optimizer, "find_spec", lambda name: object())
    optimizer.check_optimizer(optim, stochastic_rounding=False, on_gpu=True)


def test_eight_bit_moments_train(make_trainer: TrainerMaker) -> None:
    pytest.importorskip("bitsandbytes")
    trainer = make_trainer(optim="adamw_bnb_8bit", max_steps=1)
    before = weights_of(trainer)
    trainer.train()
    assert any(not torch.equal(before[name], weight) for name, weight in weights_of(trainer).items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logits_budget_mb": -1.0}, "logits_budget_mb is -1.0; it must be 0 or more"),
        ({"reference_cache_mb": float("nan")}, "reference_cache_mb is nan"),
        ({"optim": "paged_adamw_8bit"}, "nothing to page out without a GPU"),
    ],
)
def test_impossible_settings_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # transformers sets it for torch_compile.
    with pytest.raises(RecipeError, match=message):
        UnlearningConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
