"""RMU: which layer it reads, and which weights it changes, on each kind of model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from conftest import ModelMaker
from methods.conftest import MethodTrainerMaker
from sku.data.batches import ROWS, JointCollator
from sku.data.examples import RowType
from sku.errors import ModelError, RecipeError
from sku.methods.base import AnyMethod
from sku.methods.circuit_breakers import CIRCUIT_BREAKERS, CircuitBreakersSettings
from sku.methods.rmu import RMU, RmuSettings, steered_layer, steering_vector
from sku.negate.adapters import AdapterVector
from sku.training import decoder_layers

PROJECTIONS = {
    "llama": ("model.layers.{}.mlp.down_proj", "model.layers"),
    "opt": ("model.decoder.layers.{}.fc2", "model.decoder.layers"),
    "gpt_neox": ("gpt_neox.layers.{}.mlp.dense_4h_to_h", "gpt_neox.layers"),
    "gpt2": ("transformer.h.{}.mlp.c_proj", "transformer.h"),
}
LAYERS = 6


def deep_model(make_model: ModelMaker, architecture: str, layers: int = LAYERS) -> Any:
    config = make_model(architecture).config
    config.num_hidden_layers = layers
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def names_of(model: Any, settings: RmuSettings) -> list[str]:
    assert RMU.trained_modules is not None
    return list(RMU.trained_modules(settings, model))


@pytest.mark.parametrize("architecture", PROJECTIONS)
def test_the_trained_modules_are_the_output_projections_of_three_layers(
    architecture: str, make_model: ModelMaker
) -> None:
    """Layer 3: 1, 2, 3. GPT-2's attention has a ``c_proj`` as well, which is not among them."""
    model = deep_model(make_model, architecture)
    pattern, list_name = PROJECTIONS[architecture]
    assert decoder_layers(model)[0] == list_name
    assert names_of(model, RmuSettings(layer=3)) == [pattern.format(layer) for layer in (1, 2, 3)]
    assert names_of(model, RmuSettings(layer=1)) == [pattern.format(layer) for layer in (0, 1)]


@pytest.mark.parametrize(("layers", "expected"), [(2, 0), (16, 4), (32, 7)])
def test_the_layer_is_seven_of_every_thirty_two(layers: int, expected: int, make_model: ModelMaker) -> None:
    """7/32 of 2, 4, 6, 16, 24: 0.44, 0.88, 1.3, 3.5 (to even), 5.25."""
    model = deep_model(make_model, "llama", layers)
    assert steered_layer(RmuSettings(), model) == expected
    assert RMU.objective(RmuSettings(), model).hidden_layers == (expected,)


@pytest.mark.parametrize(("architecture", "full"), [("llama", True), *((name, False) for name in PROJECTIONS)])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")
def test_only_those_layers_change_bit_for_bit(
    architecture: str, full: bool, make_model: ModelMaker, make_method_trainer: MethodTrainerMaker
) -> None:
    settings = RmuSettings(layer=3)
    model = deep_model(make_model, architecture)
    allowed = names_of(model, settings)
    trainer = make_method_trainer(RMU, model, full=full, settings=settings)
    trainer.train()
    trained: Any = trainer.model
    if not full:
        assert isinstance(trained, PeftModel)
        factors = AdapterVector.of(trained).factors
        assert set(factors) == {f"{name}.weight" for name in allowed}
        assert all(change.delta().any() for change in factors.values())
        trained = trained.merge_and_unload()
    before = dict(deep_model(make_model, architecture).named_parameters())
    after = dict(trained.named_parameters())
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[0] for name in changed} == set(allowed)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_steered_state_is_the_output_of_the_named_layer(
    architecture: str, make_model: ModelMaker, make_method_trainer: MethodTrainerMaker
) -> None:
    """Read again with a hook on the layer: same states, at the position before each answer token, and so same loss."""
    model = deep_model(make_model, architecture)
    trainer = make_method_trainer(RMU, model, full=True, settings=RmuSettings(layer=2, seed=5))
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = decoder_layers(model)[1][2].register_forward_hook(keep)
    dataset: Any = trainer.train_dataset
    assert isinstance(trainer.data_collator, JointCollator)
    batch = trainer.data_collator([dataset[0]])
    with torch.no_grad():
        terms = trainer._outputs_and_terms(model, batch)[1]
    handle.remove()
    row, tokens = next((place, row.tokens) for place, row in enumerate(batch[ROWS].rows) if row.kind == RowType.FORGET)
    places = [at - 1 for at, label in enumerate(tokens.labels) if label != -100]
    steering = steering_vector(32, coefficient=6.5, seed=5)
    expected = torch.stack([(seen[0][row, at] - steering).square().mean() for at in places]).mean()
    torch.testing.assert_close(terms["forget"], expected[None])
    assert terms["retain"].item() < 1e-12, "untrained, the states are where the original model has them"


def test_lists_inside_a_layer_are_not_taken_for_the_layers_and_two_side_by_side_are_refused(
    make_model: ModelMaker,
) -> None:
    model = make_model()
    model.model.layers[0].experts = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    assert decoder_layers(model)[0] == "model.layers"
    model.towers = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    with pytest.raises(ModelError, match="model's 2 decoder layers can't be told: .* model.layers, towers"):
        decoder_layers(model)


@pytest.mark.parametrize(
    ("method", "settings", "key"),
    [
        (RMU, RmuSettings(layer=5), "layer"),
        (RMU, RmuSettings(projections=("proj",)), "projections"),  # Whole parts of a name count.
        (CIRCUIT_BREAKERS, CircuitBreakersSettings(layers=(0, 5)), "layers"),
    ],
)
def test_layers_and_modules_that_are_not_there_are_refused(
    method: AnyMethod, settings: Any, key: str, make_model: ModelMaker
) -> None:
    assert method.trained_modules is not None
    with pytest.raises(RecipeError, match=rf"methods\.{method.name}\.settings\.{key} "):
        method.trained_modules(settings, deep_model(make_model, "llama"))
