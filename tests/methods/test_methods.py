"""Every method through the real trainer on a tiny model, and what its settings leave out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from conftest import ModelMaker, weights_of
from methods.conftest import MethodTrainerMaker, assert_packed_is_padded, small_settings
from sku.config import load_recipe
from sku.data.examples import ForgetRetainData, RowPlan
from sku.errors import DataError, RecipeError
from sku.methods import METHODS, method_named
from sku.methods.base import AnyMethod
from sku.methods.run import resolve_method


@pytest.mark.parametrize(
    ("method", "full"),
    [*((method, False) for method in METHODS), (METHODS[0], True)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_two_steps_are_finite_and_move_the_weights(
    method: AnyMethod, full: bool, make_method_trainer: MethodTrainerMaker
) -> None:
    trainer = make_method_trainer(method, full=full)
    before = weights_of(trainer)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2
    for line in lines:
        terms = {name.removeprefix("loss/"): value for name, value in line.items() if name.startswith("loss/")}
        assert terms.keys() == trainer.objective.weights.keys()
        assert all(math.isfinite(value) for value in terms.values())
        weighted = sum(weight * terms[name] for name, weight in trainer.objective.weights.items())
        assert line["loss"] == pytest.approx(weighted, rel=1e-3, abs=1e-3)
    after = weights_of(trainer)
    assert any(not torch.equal(after[name], weight) for name, weight in before.items())
    assert all(weight.isfinite().all() for weight in after.values())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_losses_and_gradients_of_packed_rows_are_those_of_padded_ones(
    method: AnyMethod, make_method_trainer: MethodTrainerMaker
) -> None:
    # At its own beta SimNPO has nothing left to do on a random model, whose answers are unlikely as they are.
    settings = small_settings(method, **({"beta": 0.1} if method.name == "simnpo" else {}))
    trainer = make_method_trainer(method, settings=settings, packing="auto")
    assert trainer.packing == "tree"
    assert_packed_is_padded(trainer)


@pytest.mark.parametrize(
    ("name", "settings", "terms", "rows", "reference"),
    [
        ("gradient_ascent_mismatch", {"forget_weight": 0.0}, {"mismatch", "retain_kl"},
         RowPlan(mismatched=5, mismatched_from="retain", retain=True), True),
        ("grad_diff", {"retain_weight": 0.0}, {"ascent"}, RowPlan(forget=True), False),
        ("npo", {"retain": "none"}, {"forget"}, RowPlan(forget=True), True),
        ("rmu", {"retain_weight": 0.0}, {"forget"}, RowPlan(forget=True), False),
        ("dpo", {"retain": "gd", "preference_weight": 0.0}, {"retain"}, RowPlan(retain=True), False),
        ("safe_unlearning", {"forget_weight": 0.0}, {"safe", "retain"},
         RowPlan(retain=True, safe="data or refusal"), False),
    ],
)  # fmt: skip
def test_a_weight_of_zero_leaves_out_the_term_with_its_rows_and_the_reference(
    name: str, settings: dict[str, Any], terms: set[str], rows: RowPlan, reference: bool, make_model: ModelMaker
) -> None:
    method = method_named(name)
    objective = method.objective(method.settings(**settings), make_model())
    assert set(objective.weights) == terms
    assert (objective.rows, objective.needs_reference) == (rows, reference)


def test_a_method_is_found_by_its_name_and_those_that_learn_harmful_answers_are_hazardous() -> None:
    for method in METHODS:
        assert method_named(method.name) is method
    assert [method.name for method in METHODS if method.negates] == ["sku", "task_vector"]
    with pytest.raises(RecipeError, match="simnp.*simnpo"):
        method_named("simnp")


@pytest.mark.parametrize("settings", ["forget_weight: 0.0, retain_weight: 0.0", "forget_weight: 0.0, retain: none"])
def test_nothing_to_train_is_refused(settings: str) -> None:
    with pytest.raises(RecipeError, match=r"forget_weight and retain_weight .*npo"):
        resolve_method(load_recipe("embedded-paper", ["method=npo", f"methods.npo.settings={{{settings}}}"]))


def test_settings_are_for_the_device_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A paged optimizer, which is refused without a GPU, must not be refused on one."""
    recipe = load_recipe("embedded-paper", ["model.device=cuda"])
    monkeypatch.setattr("sku.methods.run.pick_device", torch.device)
    assert not resolve_method(recipe).training.use_cpu
    assert resolve_method(recipe, device="cpu").training.use_cpu
    assert resolve_method(load_recipe("embedded-paper", ["model.device=cpu"])).training.use_cpu


def test_dpo_trains_only_on_prompts_that_have_a_safe_answer(
    make_method_trainer: MethodTrainerMaker, safe_data: ForgetRetainData, data: ForgetRetainData
) -> None:
    dataset: Any = make_method_trainer(method_named("dpo")).train_dataset
    with_answer = {index for index, example in enumerate(safe_data.forget_train) if example.safe_answer is not None}
    assert {dataset[place].forget_index for place in range(len(dataset))} == with_answer
    assert len(with_answer) == len(safe_data.forget_train) - 1
    with pytest.raises(DataError, match="safe answer"):
        make_method_trainer(method_named("dpo"), dataset=data)
