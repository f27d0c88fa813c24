"""Operators of a user's own file: docs/examples, and files that are none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from conftest import ModelMaker
from negate.conftest import ContextMaker, disturbed, with_adapter
from sku.errors import RecipeError, TaskVectorError
from sku.losses import answer_nll
from sku.negate.diagnostics import diagnose
from sku.negate.operators import OperatedVector, operate, prepare_operators
from sku.negate.operators.base import OperatorContext
from sku.negate.task_vector import TaskVector

EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"
PERTA, NEG_MERGE, RANDOM = (str(EXAMPLES / name) for name in ("perta.py", "neg_merge.py", "random_direction.py"))


def apply(vector: TaskVector, context: OperatorContext, path: str, **settings: Any) -> OperatedVector:
    return operate(vector, prepare_operators([{path: settings}]), context)


def function(path: str, name: str) -> Any:
    """A function of an example file."""
    (prepared,) = prepare_operators([{path: {"paths": ["x"]} if path == NEG_MERGE else {}}])
    return prepared.operator.apply.__globals__[name]


def vector_of(*rows: list[float]) -> TaskVector:
    return TaskVector({"w": torch.tensor(rows)})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({NEG_MERGE: {"paths": []}}, "paths is empty"),
        ({PERTA: {"importance": "hessian"}}, "must be one of grad, fisher"),
        ({"nowhere.py": {}}, "the operator file nowhere.py can't be read"),
        ({__file__: {}}, "defines 0 operators of its own; it must define one, such as MY_OPERATOR"),
    ],
)
def test_wrong_files_and_settings(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        prepare_operators([entry])


def test_an_example_says_what_data_it_lacks(make_model: ModelMaker) -> None:
    with pytest.raises(RecipeError, match="the operator perta looks at .* there are none"):
        apply(vector_of([1.0]), OperatorContext(base=make_model()), PERTA)


# random_direction


def test_a_random_direction_keeps_norms_alone(make_context: ContextMaker) -> None:
    context = make_context()
    vector = TaskVector.between(context.base, disturbed(context.base))
    found = apply(vector, context, RANDOM)
    assert found.row_maps is None
    assert found.vector.norms() == pytest.approx(vector.norms(), rel=1e-5)
    for name, delta in vector.deltas.items():
        cosine = torch.nn.functional.cosine_similarity(found.vector.deltas[name].flatten(), delta.flatten(), dim=0)
        assert abs(float(cosine)) < 5 / math.sqrt(delta.numel())
    again = apply(vector, context, RANDOM).vector
    assert all(torch.equal(found.vector.deltas[name], delta) for name, delta in again.deltas.items())


# neg_merge


def test_sign_merge_by_hand() -> None:
    sign_merge = function(NEG_MERGE, "sign_merge")
    merged = sign_merge(
        [
            vector_of([1.0, -2.0, 3.0, 0.0, 4.0]),
            vector_of([3.0, -4.0, -3.0, 1.0, 2.0]),
            vector_of([2.0, -6.0, 3.0, 1.0, 0.0]),
        ]
    )
    torch.testing.assert_close(merged.deltas["w"], torch.tensor([[2.0, -4.0, 0.0, 0.0, 0.0]]))
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
    done = apply(vectors[0], context, NEG_MERGE, paths=[str(tmp_path / "vector"), str(tmp_path / "adapter")])
    for name, delta in function(NEG_MERGE, "sign_merge")(vectors).deltas.items():
        torch.testing.assert_close(done.vector.deltas[name], delta, rtol=1e-5, atol=1e-6)
    assert done.row_maps is None
    assert done.records[0]["share_agreed"] == pytest.approx(1 / 4, abs=0.02), (
        "three random signs agree in 2 of 8 cases"
    )


# perta


def test_relative_importance_by_hand() -> None:
    factors = function(PERTA, "relative_importance")(
        torch.tensor([3.0, 0.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, 0.0, 0.0])
    )
    assert factors.tolist() == [0.75, 0.0, 1.0, 0.5]


def test_the_fisher_diagonal_is_the_mean_of_squares_over_examples(make_context: ContextMaker) -> None:
    context = make_context()
    name = "model.layers.1.mlp.up_proj.weight"
    squares = torch.zeros(48, 32)
    for example in context.normal:
        context.base.zero_grad()
        logits = context.base(input_ids=torch.tensor([example.input_ids])).logits[0, 2:-1]
        answer_nll(logits, torch.tensor(example.input_ids[3:])).mean().backward()
        gradient = context.base.get_parameter(name).grad
        assert gradient is not None
        squares += gradient**2
    settings = prepare_operators([{PERTA: {"importance": "fisher"}}])[0].settings
    found = function(PERTA, "importance_of")(settings, [name], context.normal, context)[name]
    torch.testing.assert_close(found, squares / len(context.normal), rtol=1e-4, atol=1e-9)


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
    done = apply(vector, context, PERTA, importance=importance)
    assert done.vector.deltas[name].tolist() == [0.5] * 4
    assert math.isfinite(diagnose(vector, context)["normal_cosine"])


@pytest.mark.parametrize("importance", ["grad", "fisher"])
def test_each_entry_gets_its_factor(importance: str, make_context: ContextMaker, make_model: ModelMaker) -> None:
    context = make_context(make_model("llama_tied"))
    context.base.requires_grad_(requires_grad=False)
    vector = TaskVector.between(context.base, disturbed(context.base))
    done = apply(vector, context, PERTA, importance=importance)
    for name, delta in vector.deltas.items():
        factors = done.vector.deltas[name] / delta
        assert float(factors.min()) >= 0
        assert float(factors.max()) <= 1 + 1e-6
    assert 0.2 < done.records[0]["mean_factor"] < 0.8
    assert done.row_maps is None
