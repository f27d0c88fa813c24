"""Circuit breakers: which layers they turn and train, and their schedule in a training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import ModelMaker
from methods.conftest import MethodTrainerMaker
from methods.test_method_training import disturb, terms_of
from methods.test_rmu import deep_model
from sku.methods.circuit_breakers import CIRCUIT_BREAKERS, CircuitBreakersSettings, turned_layers


@pytest.mark.parametrize(("layers", "expected"), [(2, (0,)), (32, (9, 19))])
def test_the_layers_are_the_authors_of_every_32(
    layers: int, expected: tuple[int, ...], make_model: ModelMaker
) -> None:
    """10 and 20 of 30 layers counted from 1: 9.4 and 18.75, so 9 and 19."""
    assert turned_layers(CircuitBreakersSettings(), deep_model(make_model, "llama", layers)) == expected


@pytest.mark.parametrize(("architecture", "packing"), [("llama", "flat"), ("gpt2", "padded")])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")
def test_a_training_turns_harmful_states_and_leaves_later_layers(
    architecture: str, packing: str, make_model: ModelMaker, make_method_trainer: MethodTrainerMaker
) -> None:
    model: Any = deep_model(make_model, architecture, 4)
    settings = CircuitBreakersSettings(layers=(1,))
    trainer = make_method_trainer(
        CIRCUIT_BREAKERS, model, settings=settings, max_steps=10, learning_rate=2e-2, packing=packing
    )
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
    make_model: ModelMaker, make_method_trainer: MethodTrainerMaker
) -> None:
    found = []
    for megabytes in (2048.0, 0.0):
        trainer = make_method_trainer(CIRCUIT_BREAKERS, make_model(), reference_cache_mb=megabytes)
        disturb(trainer)
        found.append(terms_of(trainer, extra_padding=0))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
