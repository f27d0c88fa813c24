"""Operators by hand, and how a recipe names them."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import ModelMaker
from negate.conftest import ContextMaker, disturbed, with_adapter
from sku.config import NegateConfig, load_recipe
from sku.data.load import load_data, load_forget_retain
from sku.errors import RecipeError, TaskVectorError
from sku.losses import answer_nll, token_kl
from sku.models import load_model
from sku.negate import arithmetic
from sku.negate.adapters import AdapterVector, combined
from sku.negate.operators import OPERATORS, OperatedVector, operate, prepare_operators
from sku.negate.operators.base import OperatorContext, check_operators, context_of, group_of
from sku.negate.operators.by_weights import kth_largest_magnitude, minus_component
from sku.negate.operators.learned import SETS
from sku.negate.operators.texts import answer_logits, batch_of, mean_gradient, targets_of, with_first_tokens
from sku.negate.run import negate
from sku.negate.streaming import negate_folders
from sku.negate.task_vector import TaskVector
from sku.pipeline.checks import load_recipe_data

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
        ({"contrast": {"prompt_tokens": 3}}, "prompt_tokens counts where positions is decision, and it is all"),
        ({"layers": {}}, "layers has no key rest"),
        ({"layers": {"8-20": 1.0}}, "layers has no key rest"),
        ({"layers": {"20-8": 1.0, "rest": 0}}, "layers 20-8 begin at 20 and end before it, at 8"),
        ({"layers": {3: 1.0, "rest": 0}}, r"operators\[0\]\.layers has the key 3, which is no text: quote it"),
        ({"layers": {"*": "much"}}, r"operators\[0\]\.layers\.\* is 'much'; it must be a number"),
        ({"trim": {"keep": 1.0}}, "keep is 1.0"),
        ({"minus_benign": {"path": "x", "how": "add"}}, "must be one of subtract, project"),
        ({"learned": {"start": 9}}, "start is 9"),
        ({"learned": {"directions": 0}}, "directions is 0"),
        ({"learned": {"weights": {"harmful": 0}}}, "weights of harmful and refusals are 0"),
        ({"learned": {"weights": {"normal": 0}}}, "weights of normal and borderline are 0"),
    ],
)
def test_wrong_names_and_settings(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        prepare_operators([entry])


def test_a_recipe_lists_them_in_order() -> None:
    recipe = load_recipe("embedded", ["negate.operators=[{null_space: {energy: 8e-1}}, {layers: {8-20: 2, rest: 0}}]"])
    prepared = prepare_operators(recipe.negate.operators)
    assert [item.operator.name for item in prepared] == ["null_space", "layers"]
    assert prepared[0].settings.energy == 0.8
    assert recipe.to_dict()["negate"]["operators"][1] == {"layers": {"8-20": 2, "rest": 0}}
    assert prepare_operators([{"null_space": None}])[0].settings.energy == 0.9
    with pytest.raises(RecipeError, match=r"negate\.operators\[0\] names 2 operators"):
        NegateConfig(operators=({"null_space": {}, "contrast": {}},))


def test_without_data_operators_that_look_at_data_are_refused(make_model: ModelMaker) -> None:
    context = OperatorContext(base=make_model())
    for name in ("null_space", "contrast", "learned"):
        with pytest.raises(RecipeError, match=f"the operator {name} looks at .* there are none"):
            apply(vector_of([1.0]), context, {name: {}})


# layers


def of_layers(context: OperatorContext, *names: str) -> TaskVector:
    return TaskVector({name: torch.ones(context.base.state_dict()[name].shape) for name in names})


@pytest.mark.parametrize(
    ("alphas", "expected"),
    [
        ({"0": 2.0, "*mlp*": 0.0, "rest": 0.5}, [2.0, 0.0, 0.5]),
        ({"rest": 0.5, "1": 0.0, "*mlp*": 2.0}, [2.0, 0.0, 0.5]),
        ({"0-1": 3.0, "rest": 0}, [3.0, 3.0, 0.0]),
        ({"0, 1": 3.0, "rest": 0}, [3.0, 3.0, 0.0]),
    ],
)
def test_the_first_key_that_names_a_weight_counts(
    alphas: dict[str, float], expected: list[float], make_context: ContextMaker
) -> None:
    context = make_context()
    names = [LAYER.format(0), LAYER.format(1), "model.norm.weight"]
    vector = of_layers(context, *names)
    done = apply(vector, context, {"layers": alphas})
    assert [float(done.vector.deltas[name].max()) for name in names] == expected
    assert sum(done.records[0]["weights"].values()) == 3


def test_a_layer_has_no_alpha_below_0() -> None:
    with pytest.raises(RecipeError, match=r"layers\.\* is -1.*0 or more"):
        prepare_operators([{"layers": {"*": -1.0}}])


def test_layers_that_the_model_does_not_have_are_refused_before_training(make_context: ContextMaker) -> None:
    context = make_context()
    entry = {"layers": {"1-3": 1.0, "rest": 0}}
    message = "layers 1-3 names layer 2, and the model has layers 0 to 1"
    with pytest.raises(RecipeError, match=message):
        apply(of_layers(context, LAYER.format(1)), context, entry)
    with pytest.raises(RecipeError, match=message):
        check_operators(prepare_operators([entry]), context.base, load_forget_retain())
    with pytest.raises(RecipeError, match=r"no changed weight is left for \*attn\*"):
        apply(of_layers(context, LAYER.format(1)), context, {"layers": {"*attn*": 2.0, "rest": 1}})


# trim


def test_trimming_by_hand(make_context: ContextMaker) -> None:
    """Four of ten entries: -5, 4, 3 and both 2s, which are equal and so both kept. Weights compete: v keeps one."""
    vector = TaskVector(
        {"w": torch.tensor([[1.0, -5.0, 2.0], [0.5, 4.0, 3.0]]), "v": torch.tensor([0.0, -2.0, 1e-30, 1])}
    )
    done = apply(vector, make_context(), {"trim": {"keep": 0.4}})
    assert done.vector.deltas["w"].tolist() == [[0.0, -5.0, 2.0], [0.0, 4.0, 3.0]]
    assert done.vector.deltas["v"].tolist() == [0.0, -2.0, 0.0, 0.0]
    record = done.records[0]
    assert (record["entries"], record["kept"], record["smallest"]) == (10, 5, 2.0)
    assert done.row_maps is None, "no adapter can follow"


def test_the_smallest_kept_magnitude_is_that_of_a_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where blocks end within a tensor, at subnormal numbers, and where a weight is held turned."""
    monkeypatch.setattr(arithmetic, "BLOCK_ELEMENTS", 100)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(37, 11, generator=generator).T,
        "b": torch.randn(250, generator=generator).round(decimals=1),
        "c": torch.tensor([3e38, -1e-44, 0.0, -0.0]),
    }
    ordered = torch.cat([tensor.reshape(-1).abs() for tensor in tensors.values()]).sort(descending=True).values
    for k in (1, 2, 66, 300, 600, 659, 660, 661):
        assert kth_largest_magnitude(tensors, k) == float(ordered[k - 1]), k


def test_a_trimmed_twin_adapter_is_dense_and_streams_to_the_same_bits(
    make_context: ContextMaker, make_model: ModelMaker, tmp_path: Path
) -> None:
    context = make_context(make_model("llama_tied"))
    bad, good = (AdapterVector.of(with_adapter(context.base, seed=seed)) for seed in (1, 2))
    twin = TaskVector.from_factors(combined([(1.0, bad), (-1.0, good)]))
    done = apply(twin, context, {"layers": {"0": 0.5, "rest": 1}}, {"trim": {"keep": 0.1}})
    assert done.row_maps is None
    assert done.records[1]["kept"] == pytest.approx(0.1 * done.records[1]["entries"], rel=1e-3)
    context.base.save_pretrained(tmp_path / "base")
    done.vector.save(tmp_path / "vector")
    negate_folders(tmp_path / "base", tmp_path / "vector", tmp_path / "streamed", 1.5)
    streamed = load_file(tmp_path / "streamed" / "model.safetensors")
    expected = negate(context.base, done.vector, 1.5).state_dict()
    assert all(torch.equal(expected[name], weight) for name, weight in streamed.items())


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
    none = {"layers": {"*": 0.0}}
    done = apply(vector, context, none, {"minus_benign": {"path": str(tmp_path / "benign"), "how": "subtract"}})
    assert torch.equal(done.vector.deltas["model.norm.weight"], -torch.ones(32))
    with pytest.raises(TaskVectorError, match="leave nothing of the task vector"):
        apply(vector, context, none)
    empty = TaskVector({"model.norm.weight": torch.zeros(32)})
    assert apply(empty, context).vector is empty, "no operator took anything away"


# Gradients, which diagnostics take too.


def test_gradients_are_those_of_the_answers_alone(make_context: ContextMaker) -> None:
    """Against autograd on one example at a time, without padding."""
    context = make_context()
    model = copy.deepcopy(context.base)
    name = LAYER.format(1)
    sums, tokens = torch.zeros(48, 32), 0
    for example in context.normal:
        model.zero_grad()
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0, 2:-1]
        answer_nll(logits, torch.tensor(example.input_ids[3:])).sum().backward()
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        sums += gradient
        tokens += len(logits)
    found = mean_gradient(context.base, [name], context.normal, 4)[name]
    torch.testing.assert_close(found, sums / tokens, rtol=1e-4, atol=1e-7)
    assert all(parameter.grad is None for parameter in context.base.parameters())


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
    context = context_of(loaded.model, loaded.tokenizer, load_data(config, 0, forget_validation=0.2), config)
    return dataclasses.replace(
        context,
        normal=context.normal[:32],
        normal_held_out=context.normal_held_out[:32],
        harmful=context.harmful[:32],
        harmful_held_out=context.harmful_held_out[:32],
        refusals_held_out=context.refusals_held_out[:32],
        borderline_held_out=context.normal_held_out[32:64],
    )


def measured(context: OperatorContext, vector: TaskVector) -> tuple[float, float]:
    """Growth of the loss on harmful answers and KL on normal ones, nats a token."""
    changed = negate(context.base, vector)
    device = torch.device("cpu")
    harmful, normal = batch_of(context.harmful_held_out, device), batch_of(context.normal_held_out, device)
    with torch.no_grad():
        losses = [
            answer_nll(answer_logits(model, harmful), targets_of(harmful)).mean() for model in (context.base, changed)
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
    entry = {"learned": {"steps": 12, "batch_size": 16, "gain": 1.0, "weights": {"normal": 3.0}, "start": 0.3}}
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
    settings = {
        "steps": 12,
        "batch_size": 16,
        "gain": 1.0,
        "weights": {"normal": 3.0},
        "start": 0.3,
        "learning_rate": 0.1,
    }
    layers = apply(vector, world, {"learned": settings})
    directions = apply(vector, world, {"learned": {**settings, "per": "direction", "directions": 8}})
    assert len(directions.records[0]["coefficients"]) == 9 * len(vector.deltas)
    gain, divergence = measured(world, directions.vector)
    layer_gain, layer_divergence = measured(world, layers.vector)
    assert gain > 0.9
    assert divergence / gain < layer_divergence / layer_gain


def test_each_set_that_has_a_weight_is_learned_from_and_named(world: OperatorContext) -> None:
    """Of a twin vector, harmful answers' direction less that of refusals: taken away, refusals become likelier."""
    few = {name: getattr(world, name)[:8] for name in ("harmful", *SETS.values())}
    world = dataclasses.replace(world, **few)
    good = dataclasses.replace(world, harmful=world.refusals_held_out)
    vector = harmful_direction(world) - harmful_direction(good)
    settings = {
        "steps": 4,
        "start": 0.1,
        "answer_tokens": 4,
        "weights": {"harmful": 0.0, "refusals": 1.0, "borderline": 1.0},
    }
    record = apply(vector, world, {"learned": settings}).records[0]
    assert record["sets"] == {"normal": 8, "refusals": 8, "borderline": 8}
    assert set(record["last"]) == {"loss", "normal_kl", "refusals_nll", "borderline_kl"}
    assert record["last"]["refusals_nll"] < record["first"]["refusals_nll"]
    with pytest.raises(RecipeError, match=r"refusals held out examples, which are safe answers .* give --forget"):
        apply(vector, dataclasses.replace(world, refusals_held_out=()), {"learned": settings})
    with pytest.raises(RecipeError, match=r"half of each set of data\.normal .* there are none: name them"):
        check_operators(
            prepare_operators([{"learned": {"weights": {"borderline": 1.0}}}]),
            world.base,
            load_data(load_recipe("embedded").data, 0, forget_validation=0.2),
        )


def test_stage_1_does_not_train_on_what_learned_is_fitted_to() -> None:
    plain, fitted = (
        load_recipe("embedded", [f"negate={{alpha: 1, operators: [{entry}]}}"]) for entry in ("", "{learned: {}}")
    )
    assert (plain.forget_validation, fitted.forget_validation) == (0.0, fitted.sweep.validation_fraction)
    assert load_recipe_data(fitted).forget_validation


def test_first_tokens_are_read_as_in_the_whole_text(world: OperatorContext) -> None:
    device = torch.device("cpu")
    whole, cut = (batch_of(examples, device) for examples in (world.normal, with_first_tokens(world.normal, 2)))
    with torch.no_grad():
        logits = [answer_logits(world.base, batch) for batch in (whole, cut)]
    first_N = torch.cat([torch.arange(int(row.sum())) for row in whole.kept_RT]) < 2
    assert torch.equal(targets_of(whole)[first_N], targets_of(cut))
    torch.testing.assert_close(logits[0][first_N], logits[1], rtol=1e-4, atol=1e-4)


def test_equal_coefficients_of_directions_are_one_factor(world: OperatorContext) -> None:
    vector = harmful_direction(world)
    # A learning rate too small to move anything.
    entry = {"learned": {"per": "direction", "directions": 3, "steps": 1, "learning_rate": 1e-9, "start": 0.5}}
    done = apply(vector, world, entry)
    for name, delta in done.vector.deltas.items():
        torch.testing.assert_close(delta, 0.5 * vector.deltas[name], rtol=1e-4, atol=1e-6)
