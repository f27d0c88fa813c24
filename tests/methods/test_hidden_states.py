"""RMU and circuit breakers: which layers they read, and which weights they change, on each kind of model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from conftest import ModelMaker
from methods.conftest import MethodTrainerMaker, disturb, terms_and_gradients
from sku.data.batches import ROWS
from sku.data.examples import RowType
from sku.errors import ModelError, RecipeError
from sku.methods.base import AnyMethod
from sku.methods.circuit_breakers import CIRCUIT_BREAKERS, CircuitBreakersSettings, turned_layers
from sku.methods.rmu import RMU, RmuSettings, steered_layer, steering_vector
from sku.training import decoder_layers

PROJECTIONS = {
    "llama": ("model.layers.{}.mlp.down_proj", "model.layers"),
    "opt": ("model.decoder.layers.{}.fc2", "model.decoder.layers"),
    "gpt_neox": ("gpt_neox.layers.{}.mlp.dense_4h_to_h", "gpt_neox.layers"),
    "gpt2": ("transformer.h.{}.mlp.c_proj", "transformer.h"),
}


def deep_model(make_model: ModelMaker, architecture: str = "llama", layers: int = 6) -> Any:
    config = make_model(architecture).config
    config.num_hidden_layers = layers
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def trained_names(method: AnyMethod, model: Any, settings: Any) -> list[str]:
    assert method.trained_modules is not None
    return list(method.trained_modules(settings, model))


@pytest.mark.parametrize("architecture", PROJECTIONS)
def test_rmu_trains_the_output_projections_of_three_layers(architecture: str, make_model: ModelMaker) -> None:
    """Layer 3: 1, 2, 3. GPT-2's attention has a ``c_proj`` as well, which is not among them."""
    model = deep_model(make_model, architecture)
    pattern, list_name = PROJECTIONS[architecture]
    assert decoder_layers(model)[0] == list_name
    assert trained_names(RMU, model, RmuSettings(layer=3)) == [pattern.format(layer) for layer in (1, 2, 3)]
    assert trained_names(RMU, model, RmuSettings(layer=1)) == [pattern.format(layer) for layer in (0, 1)]


@pytest.mark.parametrize(("layers", "steered", "turned"), [(2, 0, (0,)), (16, 4, (4, 9)), (32, 7, (9, 19))])
def test_the_layers_are_the_authors_of_every_32(
    layers: int, steered: int, turned: tuple[int, ...], make_model: ModelMaker
) -> None:
    """7/32 of 2 and 16 counted from 0: 0.44, 3.5 (to even). 10/32 and 20/32 of 16 counted from 1: 5 and 10."""
    model = deep_model(make_model, layers=layers)
    assert steered_layer(RmuSettings(), model) == steered
    assert RMU.objective(RmuSettings(), model).hidden_layers == (steered,)
    assert turned_layers(CircuitBreakersSettings(), model) == turned


@pytest.mark.parametrize(("architecture", "full"), [("llama", True), ("gpt2", False)])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")
def test_rmu_changes_only_those_layers_bit_for_bit(
    architecture: str, full: bool, make_model: ModelMaker, make_method_trainer: MethodTrainerMaker
) -> None:
    settings = RmuSettings(layer=3)
    model = deep_model(make_model, architecture)
    allowed = trained_names(RMU, model, settings)
    trainer = make_method_trainer(RMU, model, full=full, settings=settings)
    trainer.train()
    trained: Any = trainer.model
    after = dict((trained if full else trained.merge_and_unload()).named_parameters())
    before = dict(deep_model(make_model, architecture).named_parameters())
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[0] for name in changed} == set(allowed)


def test_the_steered_state_is_the_output_of_the_named_layer(
    make_model: ModelMaker, make_method_trainer: MethodTrainerMaker
) -> None:
    """Read again with a hook on the layer: same states, at the position before each answer token, and so same loss."""
    model = deep_model(make_model, "gpt2")
    trainer = make_method_trainer(RMU, model, full=True, settings=RmuSettings(layer=2, seed=5))
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = decoder_layers(model)[1][2].register_forward_hook(keep)
    dataset: Any = trainer.train_dataset
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


def test_circuit_breakers_turn_harmful_states_and_leave_later_layers(
    make_model: ModelMaker, make_method_trainer: MethodTrainerMaker
) -> None:
    settings = CircuitBreakersSettings(layers=(1,))
    trainer = make_method_trainer(
        CIRCUIT_BREAKERS, deep_model(make_model, layers=4), settings=settings, max_steps=10, learning_rate=2e-2,
        packing="tree",
    )  # fmt: skip
    assert trainer.model is not None
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert {part for name in trained for part in name.split(".") if part.isdigit()} == {"0", "1"}
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss/reroute" in line]
    # Of the first step cosines are 1 and nothing has moved: 19/20 and 0.
    assert lines[0]["loss/reroute"] == pytest.approx(0.95, abs=1e-3)
    assert lines[0]["loss/hold"] == pytest.approx(0, abs=1e-3)
    assert lines[-1]["loss/reroute"] < 0.8 * 0.5, "the schedule alone would leave a half"
    assert lines[-1]["loss/hold"] > 0


def test_the_original_states_are_the_same_from_the_cache_and_from_the_model(
    make_method_trainer: MethodTrainerMaker,
) -> None:
    found = []
    for megabytes in (2048.0, 0.0):
        trainer = make_method_trainer(CIRCUIT_BREAKERS, reference_cache_mb=megabytes)
        disturb(trainer)
        found.append(terms_and_gradients(trainer, "padded")[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_lists_inside_a_layer_are_not_taken_for_the_layers_and_two_side_by_side_are_refused(
    make_model: ModelMaker,
) -> None:
    model = make_model()
    model.model.layers[0].experts = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    assert decoder_layers(model)[0] == "model.layers"
    model.towers = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    with pytest.raises(ModelError, match=r"model\.layers, towers"):
        decoder_layers(model)


@pytest.mark.parametrize(
    ("method", "settings", "layers", "key"),
    [
        (RMU, RmuSettings(layer=5), 6, "layer"),
        (RMU, RmuSettings(), 1, "layer"),
        (RMU, RmuSettings(projections=("proj",)), 6, "projections"),  # Whole parts of a name count.
        (CIRCUIT_BREAKERS, CircuitBreakersSettings(layers=(0, 5)), 6, "layers"),
        (CIRCUIT_BREAKERS, CircuitBreakersSettings(), 1, "layers"),
    ],
)
def test_layers_and_modules_that_are_not_there_are_refused(
    method: AnyMethod, settings: Any, layers: int, key: str, make_model: ModelMaker
) -> None:
    with pytest.raises(RecipeError, match=rf"methods\.{method.name}\.settings\.{key} "):
        trained_names(method, deep_model(make_model, layers=layers), settings)
