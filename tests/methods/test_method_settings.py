"""The list of methods, their settings, and what a weight of 0 leaves out."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ModelMaker
from methods.conftest import MethodTrainerMaker, small_settings
from sku.config import load_recipe, settings_from_dict
from sku.data.batches import ROWS, JointCollator
from sku.data.examples import RowType
from sku.errors import RecipeError
from sku.methods import METHODS, method_named
from sku.methods.base import AnyMethod
from sku.methods.run import resolve_method

FORGET, MISMATCHED, RETAIN, SAFE = RowType

BASELINES = METHODS[1:]


def test_names_are_unique_and_sku_stands_first() -> None:
    names = [method.name for method in METHODS]
    assert names == [
        "sku", "fine_tune", "gradient_ascent", "gradient_ascent_mismatch", "task_vector", "grad_diff", "grad_diff_kl",
        "npo", "simnpo", "rmu", "dpo", "refusal_tuning", "safe_unlearning", "circuit_breakers",
    ]  # fmt: skip
    assert len({method.title for method in METHODS}) == len(METHODS)
    assert all(method.paper_url.startswith("https://arxiv.org/abs/") for method in METHODS)


def test_a_method_is_found_by_its_name() -> None:
    for method in METHODS:
        assert method_named(method.name) is method
    with pytest.raises(RecipeError, match=r"no method named simnp\. Did you mean simnpo\? Known: sku, "):
        method_named("simnp")


def test_only_the_methods_that_learn_harmful_answers_are_hazardous_and_negated() -> None:
    assert [method.name for method in METHODS if method.negates] == ["sku", "task_vector"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fine_tune", {}),
        ("gradient_ascent", {}),
        (
            "gradient_ascent_mismatch",
            {"forget_weight": 0.5, "mismatch_weight": 1.0, "retain_weight": 1.0, "random_answers": 5},
        ),
        ("task_vector", {}),
        ("grad_diff", {"forget_weight": 1.0, "retain_weight": 1.0}),
        ("grad_diff_kl", {"forget_weight": 1.0, "retain_weight": 1.0}),
        ("npo", {"beta": 0.1, "forget_weight": 1.0, "retain": "gd", "retain_weight": 1.0}),
        ("simnpo", {"beta": 2.5, "gamma": 0.0, "forget_weight": 0.1375, "retain": "gd", "retain_weight": 1.0}),
        ("dpo", {"beta": 0.1, "preference_weight": 1.0, "retain": "none", "retain_weight": 1.0}),
        ("refusal_tuning", {"refusal_weight": 1.0, "retain_weight": 1.0}),
        ("safe_unlearning", {"beta": 1.0, "forget_weight": 0.3, "safe_weight": 0.5, "retain_weight": 1.0}),
        ("circuit_breakers", {"alpha": 10.0, "layers": ()}),
        (
            "rmu",
            {
                "layer": None, "steering_coefficient": 6.5, "forget_weight": 1.0, "retain_weight": 1200.0, "seed": 0,
                "projections": ("down_proj", "fc2", "dense_4h_to_h", "mlp.c_proj"),
            },
        ),
    ],
)  # fmt: skip
def test_defaults_are_those_of_paper_or_authors(name: str, expected: dict[str, Any]) -> None:
    assert dataclasses.asdict(method_named(name).settings()) == expected


@pytest.mark.parametrize("method", BASELINES[:1], ids=lambda method: method.name)
def test_an_unknown_setting_is_refused(method: AnyMethod) -> None:
    key = f"methods.{method.name}.settings"
    with pytest.raises(RecipeError, match=rf"{key}\.nonsense is not a known key"):
        settings_from_dict(method.settings, {"nonsense": 1}, key)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("gradient_ascent_mismatch", "random_answers", 0),
        ("npo", "beta", float("nan")),
        ("rmu", "projections", ()),
        ("safe_unlearning", "safe_weight", -1.0),
    ],
)
def test_an_impossible_value_is_refused_with_key_and_value(name: str, key: str, value: Any) -> None:
    shown = re.escape(f"{key} is {list(value) if value == () else value}; it must be ")
    settings, place = method_named(name).settings, f"methods.{name}.settings"
    with pytest.raises(RecipeError, match=rf"^{re.escape(place)}\.{shown}"):
        settings_from_dict(settings, {key: value}, place)
    with pytest.raises(RecipeError, match=f"^{key} is "):
        settings(**{key: value})


@pytest.mark.parametrize("name", ["npo"])
def test_an_unknown_retain_term_is_refused(name: str) -> None:
    with pytest.raises(
        RecipeError, match=rf"^methods\.{name}\.settings\.retain is 'k1'; it must be one of gd, kl, none"
    ):
        settings_from_dict(method_named(name).settings, {"retain": "k1"}, f"methods.{name}.settings")


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
    trainer = make_method_trainer(method, full=True, settings=small_settings(method, **settings), reference="copy")
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
    recipe = load_recipe("embedded", ["model.device=cuda"])
    monkeypatch.setattr("sku.methods.run.pick_device", torch.device)
    assert not resolve_method(recipe, tmp_path).training.use_cpu
    assert resolve_method(recipe, tmp_path, device="cpu").training.use_cpu
    assert resolve_method(load_recipe("embedded", ["model.device=cpu"]), tmp_path).training.use_cpu


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("methods.npo.training.lerning_rate=1", r"^methods\.npo\.training\.lerning_rate is not a field"),
        ("methods.npo.training.learning_rate=-1", r"^methods\.npo\.training\.learning_rate is -1"),
        ("methods.npo.training.optim=nope", r"^acquire\.training and methods\.npo\.training: "),
    ],
)
def test_a_wrong_training_setting_is_named_by_its_own_key(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve_method(load_recipe("embedded", ["method=npo", override]), tmp_path)
