"""Null-space projection and contrast: what they promise of a layer's outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import ModelMaker
from negate.conftest import ContextMaker, disturbed, with_adapter
from sku.errors import TaskVectorError
from sku.negate.adapters import AdapterVector
from sku.negate.operators import OperatedVector, operate, prepare_operators
from sku.negate.operators.base import OperatorContext, linear_weights
from sku.negate.operators.by_inputs import (
    NullSpaceSettings,
    Spectrum,
    Text,
    _damping,
    _map,
    _span,
    filter_matrix,
    input_spectra,
)
from sku.negate.operators.texts import InputSettings, Part
from sku.negate.run import negate
from sku.negate.task_vector import TaskVector


def apply(vector: TaskVector, context: OperatorContext, *entries: dict[str, Any]) -> OperatedVector:
    return operate(vector, prepare_operators(entries), context)


def outputs(model: Any, context: OperatorContext) -> Tensor:
    """Logits on the normal examples, all positions."""
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([example.input_ids])).logits[0] for example in context.normal])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "llama_tied"])
def test_with_all_energy_removed_normal_text_is_answered_as_before(
    architecture: str, make_context: ContextMaker, make_model: ModelMaker
) -> None:
    """Seven tokens reach fewer directions than the 32 of a layer, so that something is left of the change. Linear
    layers' outputs on these inputs are those of the original, layer after layer; hence the logits are as well.
    """
    context = make_context(make_model(architecture))
    context = make_context(context.base, normal=context.normal[:1])
    vector = TaskVector.between(context.base, disturbed(context.base, scale=0.03))
    projected = apply(vector, context, {"null_space": {"energy": 1.0}}).vector
    assert projected.norm() > 0.1 * vector.norm()
    before = outputs(context.base, context)
    for alpha in (0.5, 1.5):
        changed = negate(context.base, projected, alpha)
        torch.testing.assert_close(outputs(changed, context), before, rtol=0, atol=5e-4)
    plain = outputs(negate(context.base, vector), context)
    assert float((plain - before).abs().max()) > 0.05
    other = torch.tensor([[200, 210, 220, 230, 240, 250]])
    with torch.no_grad():
        assert float((changed(input_ids=other).logits - context.base(input_ids=other).logits).abs().max()) > 0.05


def test_one_layer_by_hand(make_context: ContextMaker) -> None:
    """Inputs in the removed directions give nothing; those orthogonal to them give what they gave."""
    context = make_context()
    name = "model.layers.0.mlp.down_proj.weight"
    delta = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    done = apply(TaskVector({name: delta}), context, {"null_space": {"rank": 5}})
    projected, inside = done.vector.deltas[name], []
    parts: tuple[Part, ...] = ("own", "shared")
    for part in parts:
        spectrum = input_spectra(context, "normal", InputSettings(), part).of(name)
        assert spectrum is not None
        inside.append(spectrum.top(5))
        torch.testing.assert_close(projected @ inside[-1], torch.zeros(32, 5), atol=1e-4, rtol=0)
    outside = torch.linalg.qr(torch.cat(inside, 1), mode="complete").Q[:, 10:]
    torch.testing.assert_close(projected @ outside, delta @ outside, atol=1e-4, rtol=0)
    assert done.records[0]["ranks"] == {name: 10}
    assert done.records[0]["mean_share_of_directions"] == pytest.approx(10 / 48)


def test_the_first_position_takes_no_share_of_the_energy() -> None:
    """Its inputs can be a hundred times as long as all others: they were the whole trace, and rank 1 was enough."""
    own = Spectrum(energies_I=torch.tensor([4.0, 3.0, 2.0, 1.0]), directions_II=torch.eye(4))
    sink = Spectrum(energies_I=torch.tensor([1e6, 0.0, 0.0, 0.0]), directions_II=torch.eye(4)[:, [3, 0, 1, 2]])
    cut, rank = _map((own, sink), NullSpaceSettings(energy=0.9))
    assert rank == 4
    torch.testing.assert_close(cut(torch.ones(1, 4)), torch.zeros(1, 4), atol=1e-6, rtol=0)
    cut, rank = _map((own, sink), NullSpaceSettings(energy=0.7))
    assert rank == 3
    torch.testing.assert_close(cut(torch.ones(1, 4)), torch.tensor([[0.0, 0.0, 1.0, 0.0]]), atol=1e-6, rtol=0)


def test_a_direction_of_both_parts_is_cut_once() -> None:
    both = torch.eye(4)[:, :2]
    assert _span([both, torch.eye(4)[:, 1:3]]).shape == (4, 3)
    assert _span([both[:, :0], both]).shape == (4, 2)
    assert _span([both[:, :0], both[:, :0]]).shape == (4, 0)


@pytest.mark.parametrize(
    "entry",
    [
        {"null_space": {"energy": 0.8}},
        {"null_space": {"soft": 2.0, "unit": True}},
        {"null_space": {"rank": 3, "positions": "answer"}},
        {"contrast": {"strength": 3.0}},
        {"contrast": {"positions": "decision", "prompt_tokens": 2, "answer_tokens": 1}},
        {"layers": {"0": 0.5, "rest": 1}},
        {"learned": {"steps": 2, "per": "layer_and_module"}},
        {"learned": {"steps": 2, "per": "direction"}},
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_projected_adapter_is_the_projected_vector(
    architecture: str, entry: dict[str, Any], make_context: ContextMaker, make_model: ModelMaker
) -> None:
    base = make_model(architecture)
    settings: dict[str, Any] = {"fan_in_fan_out": True} if architecture == "gpt2" else {}
    adapter = AdapterVector.of(with_adapter(base, **settings))
    done = apply(TaskVector.from_factors(adapter), make_context(base), entry)
    assert done.row_maps is not None
    followed = adapter.mapped(done.row_maps)
    assert {len(change.lower_rI) for change in followed.factors.values()} == {4}, "the rank stays"
    for name, delta in TaskVector.from_factors(followed).deltas.items():
        torch.testing.assert_close(delta, done.vector.deltas[name], rtol=1e-5, atol=1e-6, msg=name)


def test_operators_follow_each_other(make_context: ContextMaker) -> None:
    context = make_context()
    adapter = AdapterVector.of(with_adapter(context.base))
    first, second = {"null_space": {"energy": 0.7}}, {"layers": {"*mlp*": 0.0, "rest": 1}}
    both = apply(TaskVector.from_factors(adapter), context, first, second)
    after = apply(apply(TaskVector.from_factors(adapter), context, first).vector, context, second)
    assert [record["name"] for record in both.records] == ["null_space", "layers"]
    assert both.row_maps is not None
    followed = TaskVector.from_factors(adapter.mapped(both.row_maps))
    for name, delta in both.vector.deltas.items():
        assert torch.equal(delta, after.vector.deltas[name])
        torch.testing.assert_close(followed.deltas[name], delta, rtol=1e-5, atol=1e-6)
        assert ("mlp" in name) == (not delta.any())


@pytest.mark.parametrize("other", ["drop", "keep"])
def test_what_is_no_linear_layer_is_dropped_or_kept_and_counted(other: str, make_context: ContextMaker) -> None:
    context = make_context()
    vector = TaskVector.between(context.base, disturbed(context.base))
    done = apply(vector, context, {"null_space": {"other_weights": other}})
    others = set(vector.deltas) - set(linear_weights(context.base))
    assert done.records[0]["other_weights"] == len(others) == 6, "the embedding, four norms and the last"
    for name in others:
        expected = vector.deltas[name] if other == "keep" else torch.zeros_like(vector.deltas[name])
        assert torch.equal(done.vector.deltas[name], expected)


def test_more_energy_leaves_less(make_context: ContextMaker) -> None:
    context = make_context()
    vector = TaskVector.from_adapter(with_adapter(context.base))
    norms = [apply(vector, context, {"null_space": {"energy": energy}}).vector.norm() for energy in (0.3, 0.6, 0.9)]
    assert vector.norm() > norms[0] > norms[1] > norms[2]


def test_soft_damping_by_hand(make_context: ContextMaker) -> None:
    """A direction of the mean energy is divided by 1 + s, one without energy stays."""
    own = Spectrum(energies_I=torch.tensor([2.0, 1.0, 0.0]), directions_II=torch.eye(3))
    none = Spectrum(energies_I=torch.zeros(3), directions_II=torch.eye(3))
    damping = _damping((own, none), 3.0)
    torch.testing.assert_close(damping(torch.ones(1, 3)), torch.tensor([[1 / 7, 1 / 4, 1.0]]))
    shared = Spectrum(energies_I=torch.tensor([300.0, 0.0, 0.0]), directions_II=torch.eye(3))
    damping = _damping((own, shared), 3.0)
    torch.testing.assert_close(damping(torch.ones(1, 3)), torch.tensor([[1 / 16, 1 / 4, 1.0]]))


def test_the_filter_by_hand() -> None:
    """Directions of harmful text alone stay, of normal text alone go, of both equally: 1 / (1 + s)."""
    harmful = torch.diag(torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64))
    normal = torch.diag(torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64))
    matrix = filter_matrix(harmful, normal, 3.0, 1e-9)
    torch.testing.assert_close(matrix, torch.diag(torch.tensor([1.0, 0.0, 0.25], dtype=torch.float64)))


def test_the_filter_minimises_what_it_says_it_does() -> None:
    """Steps away from its solution in random directions cost more."""
    generator = torch.Generator().manual_seed(0)

    def root() -> Tensor:
        return torch.randn(6, 4, generator=generator, dtype=torch.float64)

    harmful_root, normal_root = root(), root()
    harmful, normal = harmful_root @ harmful_root.T, normal_root @ normal_root.T
    delta = torch.randn(3, 6, generator=generator, dtype=torch.float64)

    def cost(changed: Tensor) -> float:
        parts = ((changed - delta) @ harmful_root, changed @ normal_root, changed)
        return float(parts[0].square().sum() + 2.0 * parts[1].square().sum() + 0.6 / 6 * parts[2].square().sum())

    best = delta @ filter_matrix(harmful, normal, 2.0, 0.6)
    for _ in range(20):
        assert cost(best + 1e-3 * torch.randn(3, 6, generator=generator, dtype=torch.float64)) > cost(best)


def test_contrast_keeps_more_of_harmful_inputs_than_of_normal_ones(make_context: ContextMaker) -> None:
    context = make_context()
    vector = TaskVector(
        {
            name: torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(1))
            for name, module in linear_weights(context.base).items()
        }
    )
    done = apply(vector, context, {"contrast": {"strength": 10.0}}).vector
    kept = {}
    texts: tuple[Text, ...] = ("harmful", "normal")
    for text in texts:
        spectra = input_spectra(context, text, InputSettings())
        name = "model.layers.0.self_attn.q_proj.weight"
        spectrum = spectra.of(name)
        assert spectrum is not None
        matrix = spectrum.matrix().float()
        kept[text] = float((done.deltas[name] @ matrix @ done.deltas[name].T).trace()) / float(
            (vector.deltas[name] @ matrix @ vector.deltas[name].T).trace()
        )
    assert kept["harmful"] > 3 * kept["normal"]


def test_what_leaves_nothing_is_refused(make_context: ContextMaker) -> None:
    context = make_context()
    vector = TaskVector({"model.norm.weight": torch.ones(32)})
    with pytest.raises(TaskVectorError, match="leave nothing of the task vector"):
        apply(vector, context, {"null_space": {}})
