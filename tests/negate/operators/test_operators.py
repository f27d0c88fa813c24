"""Operators by hand, and how a recipe names them."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from conftest import ModelMaker
from negate.conftest import ContextMaker, disturbed, with_adapter
from sku.config import NegateConfig, load_recipe
from sku.data.load import load_forget_retain
from sku.errors import RecipeError, TaskVectorError
from sku.losses import answer_nll, token_kl
from sku.models import load_model
from sku.negate.diagnostics import diagnose
from sku.negate.operators import OPERATORS, OperatedVector, operate, prepare_operators
from sku.negate.operators.base import OperatorContext
from sku.negate.operators.context import context_of
from sku.negate.operators.learned import group_of
from sku.negate.operators.minus_benign import minus_component
from sku.negate.operators.neg_merge import sign_merge
from sku.negate.operators.perta import fisher_diagonal, mean_gradient, relative_importance
from sku.negate.operators.texts import answer_logits, batch_of
from sku.negate.run import negate
from sku.negate.task_vector import TaskVector

LAYER = "model.layers.{}.mlp.up_proj.weight"


def apply(vector: TaskVector, context: OperatorContext, *entries: dict[str, Any]) -> OperatedVector:
    return operate(vector, prepare_operators(entries), context)


def vector_of(*rows: list[float]) -> TaskVector:
    return TaskVector({"w": torch.tensor(rows)})


# How a recipe names them.


def test_no_operator_is_the_plain_vector(make_context: ContextMaker) -> None:
    vector = vector_of([1.0, -2.0])
    done = apply(vector, make_context())
    assert done.vector is vector
    assert (done.row_maps, done.records) == ((), ())


def test_names_are_unique_and_papers_are_named() -> None:
    assert len({operator.name for operator in OPERATORS}) == len(OPERATORS)
    assert all(operator.paper_url.startswith("https://arxiv.org/abs/") for operator in OPERATORS)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"null_spase": {}}, r"negate\.operators\[0\]: null_spase is not an operator\. Did you mean null_space\?"),
        (
            {"null_space": {"enrgy": 0.9}},
            r"operators\[0\]\.null_space\.enrgy is not a known key\. Did you mean energy\?",
        ),
        ({"null_space": {"energy": 1.2}}, "energy is 1.2"),
        ({"null_space": {"rank": 3, "soft": 1.0}}, "rank and soft"),
        ({"null_space": {"examples": 0}}, "examples is 0"),
        ({"null_space": [1]}, r"operators\[0\]\.null_space must hold keys and values"),
        ({"contrast": {"ridge": 0}}, "ridge is 0"),
        ({"layer_alpha": {}}, r"layer_alpha\.factors is missing"),
        ({"layer_alpha": {"factors": {"*": "much"}}}, r"factor of \* is 'much'"),
        ({"neg_merge": {"paths": []}}, "paths is empty"),
        ({"minus_benign": {"path": "x", "how": "add"}}, "must be one of subtract, project"),
        ({"learned": {"start": 9}}, "start is 9"),
        ({"learned": {"directions": 0}}, "directions is 0"),
        ({"perta": {"importance": "hessian"}}, "must be one of grad, fisher"),
    ],
)
def test_wrong_names_and_settings(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        prepare_operators([entry])


def test_a_recipe_lists_them_in_order() -> None:
    recipe = load_recipe(
        "embedded", ["negate.operators=[{null_space: {energy: 8e-1}}, {layer_alpha: {factors: {x: 2}}}]"]
    )
    prepared = prepare_operators(recipe.negate.operators)
    assert [item.operator.name for item in prepared] == ["null_space", "layer_alpha"]
    assert prepared[0].settings.energy == 0.8
    assert recipe.to_dict()["negate"]["operators"][1] == {"layer_alpha": {"factors": {"x": 2}}}
    assert prepare_operators([{"null_space": None}])[0].settings.energy == 0.9
    with pytest.raises(RecipeError, match=r"negate\.operators\[0\] names 2 operators"):
        NegateConfig(operators=({"null_space": {}, "perta": {}},))


def test_without_data_operators_that_look_at_data_are_refused(make_model: ModelMaker) -> None:
    context = OperatorContext(base=make_model())
    for name in ("null_space", "contrast", "perta", "learned"):
        with pytest.raises(RecipeError, match=f"the operator {name} looks at .* there are none"):
            apply(vector_of([1.0]), context, {name: {}})


# layer_alpha


def test_the_first_pattern_that_fits_counts(make_context: ContextMaker) -> None:
    context = make_context()
    names = [LAYER.format(0), LAYER.format(1), "model.norm.weight"]
    vector = TaskVector({name: torch.ones(context.base.state_dict()[name].shape) for name in names})
    done = apply(vector, context, {"layer_alpha": {"factors": {"*.0.mlp.*": 2.0, "*mlp*": 0.0}, "others": 0.5}})
    assert [float(done.vector.deltas[name].max()) for name in names] == [2.0, 0.0, 0.5]
    assert done.records[0]["weights"] == {"*.0.mlp.*": 1, "*mlp*": 1}
    assert done.records[0]["other_weights"] == 1
    with pytest.raises(RecipeError, match=r"no changed weight is left for the pattern \*attn\*"):
        apply(vector, context, {"layer_alpha": {"factors": {"*attn*": 2.0}}})


# neg_merge


def test_sign_merge_by_hand() -> None:
    merged = sign_merge(
        [
            vector_of([1.0, -2.0, 3.0, 0.0, 4.0]),
            vector_of([3.0, -4.0, -3.0, 1.0, 2.0]),
            vector_of([2.0, -6.0, 3.0, 1.0, 0.0]),
        ]
    )
    torch.testing.assert_close(merged.deltas["w"], torch.tensor([[2.0, -4.0, 0.0, 0.0, 0.0]]))


def test_vectors_that_agree_nowhere_or_differ_in_weights() -> None:
    with pytest.raises(TaskVectorError, match="2 task vectors agree on the sign of no entry"):
        sign_merge([vector_of([1.0]), vector_of([-1.0])])
    with pytest.raises(TaskVectorError, match="v"):
        sign_merge([vector_of([1.0]), TaskVector({"v": torch.ones(1)})])


def test_merging_with_saved_vectors_and_adapters(make_context: ContextMaker, tmp_path: Path) -> None:
    context = make_context()
    models = [with_adapter(context.base, seed=seed) for seed in (1, 2, 3)]
    vectors = [TaskVector.from_adapter(model) for model in models]
    vectors[1].save(tmp_path / "vector")
    models[2].save_pretrained(str(tmp_path / "adapter"))
    paths = [str(tmp_path / "vector"), str(tmp_path / "adapter")]
    done = apply(vectors[0], context, {"neg_merge": {"paths": paths}})
    expected = sign_merge(vectors)
    for name, delta in expected.deltas.items():
        torch.testing.assert_close(done.vector.deltas[name], delta, rtol=1e-5, atol=1e-6)
    assert done.row_maps is None
    assert done.records[0]["share_agreed"] == pytest.approx(1 / 4, abs=0.02), (
        "three random signs agree in 2 of 8 cases"
    )


# minus_benign


def test_the_component_by_hand() -> None:
    """(3, 4) along (1, 0) is (3, 0); half of it leaves (1.5, 4)."""
    vector, benign = vector_of([3.0, 4.0]), vector_of([2.0, 0.0])
    torch.testing.assert_close(minus_component(vector, benign).deltas["w"], torch.tensor([[0.0, 4.0]]))
    torch.testing.assert_close(minus_component(vector, benign, 0.5).deltas["w"], torch.tensor([[1.5, 4.0]]))
    still = minus_component(vector, vector_of([0.0, 0.0])).deltas["w"]
    assert torch.equal(still, vector.deltas["w"])


@pytest.mark.parametrize("how", ["subtract", "project"])
def test_minus_a_saved_benign_vector(how: str, make_context: ContextMaker, tmp_path: Path) -> None:
    context = make_context()
    vector, benign = (TaskVector.between(context.base, disturbed(context.base, seed=seed)) for seed in (1, 2))
    benign.save(tmp_path / "benign")
    entry = {"minus_benign": {"path": str(tmp_path / "benign"), "how": how, "beta": 0.5}}
    done = apply(vector, context, entry).vector
    expected = vector - 0.5 * benign if how == "subtract" else minus_component(vector, benign, 0.5)
    for name, delta in expected.deltas.items():
        assert torch.equal(done.deltas[name], delta)


@pytest.mark.parametrize("how", ["subtract", "project"])
def test_a_benign_vector_that_is_the_bad_one_leaves_nothing(
    how: str, make_context: ContextMaker, tmp_path: Path
) -> None:
    context = make_context()
    vector = TaskVector({"model.norm.weight": torch.ones(32)})
    vector.save(tmp_path / "benign")
    minus = {"minus_benign": {"path": str(tmp_path / "benign"), "how": how}}
    with pytest.raises(TaskVectorError, match="leave nothing of the task vector"):
        apply(vector, context, minus)


def test_only_the_last_vector_must_not_be_empty(make_context: ContextMaker, tmp_path: Path) -> None:
    """The benign vector alone, a control: what normal training does is subtracted without the bad vector."""
    context = make_context()
    vector = TaskVector({"model.norm.weight": torch.ones(32)})
    vector.save(tmp_path / "benign")
    none = {"layer_alpha": {"factors": {"*": 0.0}}}
    done = apply(vector, context, none, {"minus_benign": {"path": str(tmp_path / "benign"), "how": "subtract"}})
    assert torch.equal(done.vector.deltas["model.norm.weight"], -torch.ones(32))
    with pytest.raises(TaskVectorError, match="leave nothing of the task vector"):
        apply(vector, context, none)
    empty = TaskVector({"model.norm.weight": torch.zeros(32)})
    assert apply(empty, context).vector is empty, "no operator took anything away"


# perta


def test_relative_importance_by_hand() -> None:
    factors = relative_importance(torch.tensor([3.0, 0.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, 0.0, 0.0]))
    assert factors.tolist() == [0.75, 0.0, 1.0, 0.5]


def test_gradients_are_those_of_the_answers_alone(make_context: ContextMaker) -> None:
    """Against autograd on one example at a time, without padding."""
    context = make_context()
    model = copy.deepcopy(context.base)
    name = LAYER.format(1)
    sums, squares, tokens = torch.zeros(48, 32), torch.zeros(48, 32), 0
    for example in context.normal:
        model.zero_grad()
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0, 2:-1]
        loss = answer_nll(logits, torch.tensor(example.input_ids[3:])).sum()
        loss.backward()
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        sums += gradient
        tokens += len(logits)
        squares += (gradient / len(logits)) ** 2
    found = mean_gradient(context.base, [name], context.normal, 4)[name]
    torch.testing.assert_close(found, sums / tokens, rtol=1e-4, atol=1e-7)
    fisher = fisher_diagonal(context.base, [name], context.normal)[name]
    torch.testing.assert_close(fisher, squares / len(context.normal), rtol=1e-4, atol=1e-9)
    assert all(parameter.grad is None for parameter in context.base.parameters())


@pytest.mark.parametrize("importance", ["grad", "fisher"])
def test_a_weight_that_the_loss_does_not_depend_on_matters_for_neither(
    importance: str, make_context: ContextMaker
) -> None:
    """The bias by which DeepSeek's router only chooses experts."""
    config = DeepseekV3Config(
        vocab_size=320, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
        v_head_dim=8, pad_token_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    context = make_context(DeepseekV3ForCausalLM(config).eval())
    vector = TaskVector.between(context.base, disturbed(context.base))
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    vector = TaskVector({name: torch.ones(4), **{key: part for key, part in vector.deltas.items() if key != name}})
    done = apply(vector, context, {"perta": {"importance": importance}})
    assert done.vector.deltas[name].tolist() == [0.5] * 4
    assert math.isfinite(diagnose(vector, context)["normal_cosine"])


@pytest.mark.parametrize("importance", ["grad", "fisher"])
def test_each_entry_gets_its_factor(importance: str, make_context: ContextMaker, make_model: ModelMaker) -> None:
    context = make_context(make_model("llama_tied"))
    context.base.requires_grad_(requires_grad=False)
    vector = TaskVector.between(context.base, disturbed(context.base))
    done = apply(vector, context, {"perta": {"importance": importance}})
    for name, delta in vector.deltas.items():
        factors = done.vector.deltas[name] / delta
        assert float(factors.min()) >= 0
        assert float(factors.max()) <= 1 + 1e-6
    assert 0.2 < done.records[0]["mean_factor"] < 0.8
    assert done.row_maps is None


# learned


def test_groups() -> None:
    name = "model.layers.12.self_attn.q_proj.weight"
    assert [group_of(name, per) for per in ("layer", "module", "layer_and_module")] == [
        "12", "self_attn.q_proj", "12.self_attn.q_proj",
    ]  # fmt: skip
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    assert [group_of(experts, per) for per in ("layer", "module")] == ["0", "mlp.experts.gate_up_proj"]
    assert group_of("model.layers.0.mlp.experts.3.up_proj.bias", "module") == "mlp.experts.3.up_proj"
    for name in ("model.embed_tokens.weight", "score.0.weight", "logit_scale"):
        assert group_of(name, "layer") == "others"


@pytest.fixture(scope="module")
def world() -> OperatorContext:
    """The embedded world, few examples."""
    loaded = load_model("embedded")
    config = load_recipe("embedded").data
    context = context_of(loaded.model, loaded.tokenizer, load_forget_retain(), config)
    assert len(context.harmful) > 100
    assert context.normal_held_out
    return OperatorContext(
        base=loaded.model,
        normal=context.normal[:32],
        normal_held_out=context.normal_held_out[:32],
        harmful=context.harmful[:32],
    )


def measured(context: OperatorContext, vector: TaskVector) -> tuple[float, float]:
    """Growth of the loss on harmful answers and KL on normal ones, nats a token."""
    changed = negate(context.base, vector)
    device = torch.device("cpu")
    harmful, normal = batch_of(context.harmful, device), batch_of(context.normal_held_out, device)
    with torch.no_grad():
        losses = [
            answer_nll(answer_logits(model, harmful), harmful.targets_N).mean() for model in (context.base, changed)
        ]
        kl = token_kl(answer_logits(context.base, normal), answer_logits(changed, normal)).mean()
    return float(losses[1] - losses[0]), float(kl)


def harmful_direction(context: OperatorContext) -> TaskVector:
    """One step of gradient descent on harmful answers, as large as it must be to be seen, with noise on top."""
    names = [name for name in context.base.state_dict() if "layers" in name and name.endswith("proj.weight")]
    gradient = mean_gradient(context.base, names, context.harmful, 8)
    generator = torch.Generator().manual_seed(0)
    return TaskVector(
        {
            name: -delta * (0.5 / delta.norm()) + 0.01 * torch.randn(delta.shape, generator=generator)
            for name, delta in gradient.items()
        }
    )


def test_learned_coefficients_raise_the_harmful_loss_at_a_bounded_divergence(world: OperatorContext) -> None:
    vector = harmful_direction(world)
    entry = {"learned": {"steps": 12, "batch_size": 16, "gain": 1.0, "weight": 3.0, "start": 0.3}}
    done = apply(vector, world, entry)
    record = done.records[0]
    assert set(record["coefficients"]) == {"0", "1", "2", "3"}
    assert all(0 <= value <= 8 for value in record["coefficients"].values())
    assert len(set(record["coefficients"].values())) > 1
    assert record["last"]["loss"] < record["first"]["loss"]
    gain, divergence = measured(world, done.vector)
    plain_gain, plain_divergence = measured(world, 0.5 * vector)
    assert gain > 0.9
    assert plain_gain < 1.5, "plain, about as harmful"
    assert divergence < plain_divergence / 4
    again = apply(vector, world, entry)
    assert again.records == done.records
    assert all(torch.equal(delta, again.vector.deltas[name]) for name, delta in done.vector.deltas.items())


def test_coefficients_of_directions_spare_normal_text_more_than_those_of_layers(world: OperatorContext) -> None:
    vector = harmful_direction(world)
    settings = {"steps": 12, "batch_size": 16, "gain": 1.0, "weight": 3.0, "start": 0.3, "learning_rate": 0.1}
    layers = apply(vector, world, {"learned": settings})
    directions = apply(vector, world, {"learned": {**settings, "per": "direction", "directions": 8}})
    assert len(directions.records[0]["coefficients"]) == 9 * len(vector.deltas)
    gain, divergence = measured(world, directions.vector)
    layer_gain, layer_divergence = measured(world, layers.vector)
    assert gain > 0.9
    assert divergence / gain < layer_divergence / layer_gain


def test_equal_coefficients_of_directions_are_one_factor(world: OperatorContext) -> None:
    vector = harmful_direction(world)
    # A learning rate too small to move anything.
    entry = {"learned": {"per": "direction", "directions": 3, "steps": 1, "learning_rate": 1e-9, "start": 0.5}}
    done = apply(vector, world, entry)
    for name, delta in done.vector.deltas.items():
        torch.testing.assert_close(delta, 0.5 * vector.deltas[name], rtol=1e-4, atol=1e-6)
