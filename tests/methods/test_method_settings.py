"""The list of methods, their settings, and what a weight of 0 leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ModelMaker
from methods.conftest import MethodTrainerMaker, small_settings
from sku.config import load_recipe
from sku.data.batches import ROWS, JointCollator
from sku.data.examples import RowType
from sku.errors import RecipeError
from sku.methods import METHODS, method_named
from sku.methods.run import resolve_method

FORGET, MISMATCHED, RETAIN, SAFE = RowType


def test_a_method_is_found_by_its_name() -> None:
    for method in METHODS:
        assert method_named(method.name) is method
    with pytest.raises(RecipeError, match="simnp.*simnpo"):
        method_named("simnp")


def test_only_the_methods_that_learn_harmful_answers_are_hazardous_and_negated() -> None:
    assert [method.name for method in METHODS if method.negates] == ["sku", "task_vector"]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("grad_diff", {"forget_weight": 0.0, "retain_weight": 0.0}),
        ("npo", {"forget_weight": 0.0, "retain": "none"}),
        ("safe_unlearning", {"forget_weight": 0.0, "safe_weight": 0.0, "retain_weight": 0.0}),
    ],
)
def test_nothing_to_train_is_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="nothing to train"):
        method_named(name).settings(**settings)


ON = [
    ("sku", {}, {"guided_distortion", "random_disassociation", "preservation_divergence"},
     {FORGET, MISMATCHED, RETAIN}, True),
    ("fine_tune", {}, {"retain"}, {RETAIN}, False),
    ("gradient_ascent", {}, {"ascent"}, {FORGET}, False),
    ("gradient_ascent_mismatch", {}, {"ascent", "mismatch", "retain_kl"}, {FORGET, MISMATCHED, RETAIN}, True),
    ("gradient_ascent_mismatch", {"forget_weight": 0.0}, {"mismatch", "retain_kl"}, {MISMATCHED, RETAIN}, True),
    ("task_vector", {}, {"guided_distortion"}, {FORGET}, False),
    ("grad_diff", {}, {"ascent", "retain"}, {FORGET, RETAIN}, False),
    ("grad_diff", {"retain_weight": 0.0}, {"ascent"}, {FORGET}, False),
    ("grad_diff_kl", {}, {"ascent", "retain_kl"}, {FORGET, RETAIN}, True),
    ("npo", {}, {"forget", "retain"}, {FORGET, RETAIN}, True),
    ("npo", {"retain": "none"}, {"forget"}, {FORGET}, True),
    ("simnpo", {}, {"forget", "retain"}, {FORGET, RETAIN}, False),
    ("rmu", {}, {"forget", "retain"}, {FORGET, RETAIN}, True),
    ("rmu", {"retain_weight": 0.0}, {"forget"}, {FORGET}, False),
    ("dpo", {}, {"preference"}, {FORGET, SAFE}, True),
    ("dpo", {"retain": "gd", "preference_weight": 0.0}, {"retain"}, {RETAIN}, False),
    ("refusal_tuning", {}, {"refusal", "retain"}, {RETAIN, SAFE}, False),
    ("safe_unlearning", {}, {"forget", "safe", "retain"}, {FORGET, RETAIN, SAFE}, True),
    ("safe_unlearning", {"forget_weight": 0.0}, {"safe", "retain"}, {RETAIN, SAFE}, False),
    ("circuit_breakers", {}, {"reroute", "hold"}, {FORGET, RETAIN}, True),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "terms", "kinds", "reference"), ON)
def test_terms_rows_and_reference_are_those_that_are_on_and_no_others(
    name: str,
    settings: dict[str, Any],
    terms: set[str],
    kinds: set[int],
    reference: bool,
    make_method_trainer: MethodTrainerMaker,
    make_model: ModelMaker,
) -> None:
    method = method_named(name)
    trainer = make_method_trainer(
        method, full=True, settings=small_settings(method, **settings), reference_cache_mb=0.0
    )
    dataset: Any = trainer.train_dataset
    assert isinstance(trainer.data_collator, JointCollator)
    batch = trainer.data_collator([dataset[0], dataset[1]])
    assert set(batch[ROWS].kept) == kinds
    assert (trainer._reference is not None) is reference
    model: Any = trainer.model
    losses = trainer._outputs_and_terms(model, batch)[1]
    assert set(losses) == terms == set(trainer.objective.weights)
    assert all(loss.shape == (2,) for loss in losses.values())


def test_settings_are_for_the_device_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A paged optimizer, which is refused without a GPU, must not be refused on one."""
    recipe = load_recipe("embedded-paper", ["model.device=cuda"])
    monkeypatch.setattr("sku.methods.run.pick_device", torch.device)
    assert not resolve_method(recipe, tmp_path).training.use_cpu
    assert resolve_method(recipe, tmp_path, device="cpu").training.use_cpu
    assert resolve_method(load_recipe("embedded-paper", ["model.device=cpu"]), tmp_path).training.use_cpu
