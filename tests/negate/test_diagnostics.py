"""Diagnostics and survival by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from conftest import ModelMaker
from negate.conftest import ContextMaker, disturbed, with_adapter
from sku.negate.adapters import AdapterVector
from sku.negate.arithmetic import LowRank
from sku.negate.diagnostics import (
    cosine,
    delta_survival,
    diagnose,
    effective_rank,
    effective_rank_of_factors,
    normal_share,
)
from sku.negate.operators.base import OperatorContext
from sku.negate.operators.by_inputs import InputSpectra, Spectrum, input_spectra
from sku.negate.operators.texts import InputSettings, mean_gradient
from sku.negate.task_vector import TaskVector
from sku.quantization import rounded_layers

DOWN = "model.layers.{}.mlp.down_proj.weight"


def test_effective_rank_by_hand() -> None:
    """Equal singular values count fully; 3 and 1 give exp(-0.75 ln 0.75 - 0.25 ln 0.25)."""
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.ones(3, 7)) == pytest.approx(1, abs=1e-3)
    expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert effective_rank(torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])) == pytest.approx(expected)
    assert effective_rank(torch.zeros(2, 2)) == 0


def test_effective_rank_from_factors_is_that_of_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    change = LowRank(upper_Or=torch.randn(9, 3, generator=generator), lower_rI=torch.randn(3, 12, generator=generator))
    dense = effective_rank(change.upper_Or @ change.lower_rI)
    assert effective_rank_of_factors(change) == pytest.approx(dense, rel=1e-3)
    assert 1 < dense < 3


def test_share_in_the_normal_subspace_by_hand() -> None:
    """90 % of the energy are two directions of four; (3, 0, 4, 0) has 9 of 25 there, a random row half."""
    spectrum = Spectrum(energies_I=torch.tensor([5.0, 4.0, 1.0, 0.0]), directions_II=torch.eye(4))
    spectra = InputSpectra(of_group={"w": spectrum}, group_of={"w": "w"}, positions=1)
    vector = TaskVector({"w": torch.tensor([[3.0, 0.0, 4.0, 0.0]]), "bias": torch.ones(2)})
    share = normal_share(vector, spectra, set())
    assert share == {
        "normal_share": pytest.approx(9 / 25), "normal_share_of_directions": 0.5, "normal_rank": {"w": 2},
    }  # fmt: skip
    turned = TaskVector({"w": torch.tensor([[3.0, 0.0, 4.0, 0.0]]).T})
    assert normal_share(turned, spectra, {"w"})["normal_share"] == pytest.approx(9 / 25)


def test_norms_by_layer_and_module(make_context: ContextMaker) -> None:
    context = make_context(normal=())
    zero = torch.zeros(32, 48)
    first, second = zero.clone(), zero.clone()
    first[0, 0], second[0, 0] = 3.0, 4.0
    vector = TaskVector({DOWN.format(0): first, DOWN.format(1): second, "model.norm.weight": torch.zeros(32)})
    found = diagnose(vector, context)
    assert found["norm"] == pytest.approx(5)
    assert found["layers"] == pytest.approx({"0": 3, "1": 4, "others": 0})
    assert found["modules"] == pytest.approx({"mlp.down_proj": 5, "others": 0})
    assert found["effective_rank"] == pytest.approx({DOWN.format(0): 1, DOWN.format(1): 1})
    assert found["without_rank"] == 1
    assert found["warning"] is None
    assert not {"normal_cosine", "normal_share"} & set(found), "no normal examples, nothing about them"


def test_the_cosine_with_normal_training(make_context: ContextMaker) -> None:
    """The step of descent on normal answers itself has 1 and its opposite -1."""
    context = make_context()
    names = [DOWN.format(0), "model.layers.1.self_attn.q_proj.weight"]
    step = TaskVector({name: -part for name, part in mean_gradient(context.base, names, context.normal, 4).items()})
    along = diagnose(1e3 * step, context)
    assert along["normal_cosine"] == pytest.approx(1, abs=1e-5)
    assert along["warning"] is not None
    against = diagnose(-step, context)
    assert against["normal_cosine"] == pytest.approx(-1, abs=1e-5)


def test_a_vector_within_the_normal_inputs_is_warned_of(make_context: ContextMaker) -> None:
    context = make_context()
    spectrum = input_spectra(context, "normal", InputSettings()).of(DOWN.format(0))
    assert spectrum is not None
    inside = torch.randn(32, 1, generator=torch.Generator().manual_seed(0)) @ spectrum.top(1).T
    found = diagnose(TaskVector({DOWN.format(0): inside}), context)
    assert found["normal_share"] == pytest.approx(1, abs=1e-4)
    assert "mostly points at normal behaviour" in found["warning"]
    outside = inside @ spectrum.directions_II @ torch.eye(48).roll(40, dims=1) @ spectrum.directions_II.T
    assert diagnose(TaskVector({DOWN.format(0): outside}), context)["normal_share"] < 0.01


def test_all_of_it_is_json_and_an_adapter_gives_the_same(make_context: ContextMaker, make_model: ModelMaker) -> None:
    context = make_context(make_model("llama_tied"))
    adapter = AdapterVector.of(with_adapter(context.base))
    vector = TaskVector.from_factors(adapter)
    dense, factored = diagnose(vector, context), diagnose(vector, context, adapter=adapter)
    json.dumps(dense, allow_nan=False)
    for name, rank in factored["effective_rank"].items():
        assert rank == pytest.approx(dense["effective_rank"][name], rel=1e-2)
        assert 1 < rank <= 4.01
    whole = diagnose(TaskVector.between(context.base, disturbed(context.base)), context)
    assert whole["without_rank"] == 5, "norms"
    assert json.dumps(whole, allow_nan=False)


def test_cosine_by_hand() -> None:
    first, second = (TaskVector({"w": torch.tensor(row)}) for row in ([3.0, 4.0], [4.0, 3.0]))
    assert cosine(first, second) == pytest.approx(24 / 25)
    assert cosine(first, TaskVector({"w": torch.zeros(2)})) == 0


# Survival.


def one_layer(base: Any, name: str, weight: float, delta: float) -> TaskVector:
    with torch.no_grad():
        base.get_parameter(name).fill_(weight)
    return TaskVector({name: torch.full_like(base.get_parameter(name), delta)})


def test_a_change_below_half_a_step_is_gone(make_model: ModelMaker) -> None:
    """bfloat16 has steps of 2^-8 below 1 and 2^-7 above, float16 of 2^-11 and 2^-10: 1 - 2^-10 is a float16 number and
    rounds to 1 in bfloat16. With one value a channel, 8 and 4 bits hold each exactly: nothing is lost there.
    """
    base = make_model()
    name = DOWN.format(0)
    found = delta_survival(base, one_layer(base, name, 1.0, 2.0**-10), 1.0)
    assert (found["bf16"]["changed"], found["bf16"]["projection"]) == (0.0, 0.0)
    for form in ("fp16", "int8", "nf4"):
        assert (found[form]["changed"], found[form]["projection"]) == (1.0, pytest.approx(1.0, abs=1e-3)), form
    assert found["bf16"]["tensors"] == {name: 0.0}
    assert found["bf16"]["entries"] == 32 * 48
    larger = delta_survival(base, one_layer(base, name, 1.0, 2.0**-10), 4.0)
    assert larger["bf16"]["projection"] == 1.0, "four times as much is a step"


def test_8_bits_hide_what_is_smaller_than_their_step(make_model: ModelMaker) -> None:
    """One weight of 1.27 a channel makes a step of 0.01 for the others: from 0, 0.004 is lost and 0.009 is a step."""
    base = make_model()
    name = DOWN.format(0)
    with torch.no_grad():
        base.get_parameter(name).zero_()
        base.get_parameter(name)[:, 0] = 1.27
    for size, projection in ((-0.004, 0.0), (-0.009, 0.01 / 0.009)):
        delta = torch.full((32, 48), size)
        delta[:, 0] = 0
        found = delta_survival(base, TaskVector({name: delta}), 1.0, formats=["int8"])["int8"]
        assert found["projection"] == pytest.approx(projection, rel=1e-4)
        assert found["entries"] == 32 * 47


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_only_layers_are_quantized_and_the_rest_is_counted(
    architecture: str, make_model: ModelMaker, make_context: ContextMaker
) -> None:
    base = make_model(architecture)
    vector = TaskVector.between(base, disturbed(base, scale=0.01))
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    found = delta_survival(base, vector, 1.0)
    json.dumps(found, allow_nan=False)
    assert found["bf16"]["not_rounded"] == 0
    assert found["int8"]["not_rounded"] == len(vector.deltas) - len(rounded_layers(base)) > 0
    assert found["fp16"]["projection"] == pytest.approx(1.0, abs=0.01)
    assert found["nf4"]["changed"] < found["bf16"]["changed"]
    assert found["nf4"]["projection"] == pytest.approx(1.0, abs=0.1), "on average rounding has no bias"
    assert all(torch.equal(before[name], weight) for name, weight in base.state_dict().items())
    assert OperatorContext(base=base).normal == ()
