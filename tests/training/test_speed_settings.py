"""Settings that make training faster or smaller and change nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from conftest import ModelMaker, TrainerMaker
from sku.acquire.trainer import SkuTrainer
from sku.errors import RecipeError
from sku.models import plain_model
from sku.training import config as config_module
from sku.training import optimizer
from sku.training.config import UnlearningConfig
from sku.training.layers import decoder_layers


def weights_of(trainer: SkuTrainer) -> dict[str, Tensor]:
    assert trainer.model is not None
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_layers_train_the_same_and_are_plain_again_afterwards(
    make_trainer: TrainerMaker, make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the backend that captures graphs and runs them as they are; adapters are switched off and on under it."""
    runs = []
    compiled: list[Any] = []
    for backend in ("eager", None):
        trainer = make_trainer(
            make_model(), compile_layers=backend, reference="forward", optim="sgd",
            learning_rate=0.1, preservation_mode="retention",
        )  # fmt: skip
        model = trainer.model
        assert isinstance(model, PeftModel)
        layers = decoder_layers(plain_model(model))[1]
        real = trainer._forward

        def note(*args: Any, layers: Any = layers, real: Any = real, **kwargs: Any) -> Any:
            compiled.append(layers[0]._compiled_call_impl is not None)
            return real(*args, **kwargs)

        monkeypatch.setattr(trainer, "_forward", note)
        trainer.train()
        assert compiled[-1] is (backend is not None)
        assert layers[0]._compiled_call_impl is None
        runs.append(weights_of(trainer))
    for name, weight in runs[0].items():
        torch.testing.assert_close(weight, runs[1][name], rtol=1e-4, atol=1e-6, msg=name)
    torch._dynamo.reset()


def test_lengths_are_rounded_up_and_the_loss_stays(make_trainer: TrainerMaker) -> None:
    losses = []
    for multiple in (1, 32):
        trainer = make_trainer(pad_to_multiple_of=multiple)
        length = trainer.data_collator([trainer.train_dataset[0]])["input_ids"].shape[1]  # type: ignore[index]
        assert length % multiple == 0
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


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
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0; it must be 1 or more"),
        ({"optim": "paged_adamw_8bit"}, "nothing to page out without a GPU"),
        ({"compile_layers": "inductor", "torch_compile": True}, "exclude each other"),
        ({"compile_layers": "fast"}, "compile_layers is 'fast', which torch doesn't know"),
    ],
)
def test_impossible_settings_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # transformers sets it for torch_compile.
    with pytest.raises(RecipeError, match=message):
        UnlearningConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
