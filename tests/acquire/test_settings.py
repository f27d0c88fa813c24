"""Settings of stage 1 and the call that runs it from a recipe."""

from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast

from conftest import ModelMaker, sku_config
from sku.config import (
    AcquireConfig,
    DataConfig,
    LoraSettings,
    ModulesConfig,
    Recipe,
    SourceConfig,
    WeightsConfig,
    load_recipe,
)
from sku.data.examples import ForgetRetainData, RowPlan
from sku.errors import OutputError, RecipeError
from sku.methods.run import resolve_method, train_method
from sku.methods.sku import TERMS, sku_objective
from sku.models import LoadedModel
from sku.training.run import adapter_settings
from sku.training.trainer import UnlearningTrainer

SOURCES = DataConfig(
    forget=SourceConfig(path="embedded"), retain=SourceConfig(path="embedded"), max_length=64, max_answer_tokens=16
)
TRAINING = {
    "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "dataloader_pin_memory": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"guided_distortion": -1.0}}, "guided_distortion is -1.0"),
        ({"weights": dict.fromkeys(TERMS, 0.0)}, "are all 0"),
        ({"random_answers": 0}, "random_answers is 0"),
        ({"preservation_cap": 0.0}, "preservation_cap is 0.0"),
        ({"train_twin": "ugly"}, "must be bad or good"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"packing": "trees"}, "packing is 'trees'"),
    ],
)
def test_settings_that_can_not_work_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        sku_config(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_a_good_twin_needs_the_module_that_teaches_it_refusals() -> None:
    with pytest.raises(RecipeError, match="guided distortion, whose weight is 0"):
        sku_objective(ModulesConfig(weights=WeightsConfig(guided_distortion=0.0)), twin="good")


def test_settings_of_the_trainer_are_plain_data_for_those_who_log_them(tmp_path: Path) -> None:
    settings = sku_config(output_dir=str(tmp_path), use_cpu=True, random_answers=3)
    assert json.loads(json.dumps(settings.to_dict()))["modules"]["random_answers"] == 3


def recipe_of(**acquire: Any) -> Recipe:
    return dataclasses.replace(load_recipe("embedded-paper"), data=SOURCES, acquire=AcquireConfig(**acquire))


def test_every_setting_of_the_recipe_arrives() -> None:
    recipe = dataclasses.replace(recipe_of(random_answers=3, training=TRAINING), seed=7)
    prepared = resolve_method(recipe)
    assert prepared.settings == recipe.acquire
    settings = prepared.training
    assert (settings.seed, settings.max_steps) == (7, 2)
    assert (settings.max_length, settings.max_answer_tokens) == (64, 16)
    weights = WeightsConfig(guided_distortion=1.5, random_disassociation=0.5, preservation_divergence=0.0)
    objective = sku_objective(ModulesConfig(weights=weights, random_answers=3))
    assert objective.weights == {"guided_distortion": 1.5, "random_disassociation": 0.5}
    assert objective.rows == RowPlan(forget=True, mismatched=3)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"learning_rat": 1e-3}, r"acquire.training.learning_rat .* learning_rate"),
        ({"seed": 3}, "acquire.training.seed"),
        ({"lr_scheduler_type": "zigzag"}, "acquire.training: .*zigzag"),
        ({"learning_rate": "small"}, "acquire.training.learning_rate is 'small'"),
    ],
)
def test_training_settings_that_can_not_work(training: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve_method(recipe_of(training=training))


def test_the_adapter_of_each_tuning() -> None:
    assert adapter_settings(AcquireConfig(tuning="full")) is None
    settings = adapter_settings(AcquireConfig(lora=LoraSettings(r=4, alpha=9, target_modules=("q_proj", "v_proj"))))
    assert isinstance(settings, LoraConfig)
    assert (settings.r, settings.lora_alpha, set(settings.target_modules or ())) == (4, 9, {"q_proj", "v_proj"})


@pytest.mark.parametrize(
    ("error", "is_of_disk"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "optimizer.pt"), True),  # Relative to an open folder.
        (ConnectionError("the service is away"), False),
    ],
    ids=repr,
)
def test_only_what_a_disk_refuses_is_a_checkpoint_that_can_not_be_written(
    error: OSError, is_of_disk: bool, make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast,
    data: ForgetRetainData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(UnlearningTrainer, "train", fail)
    loaded = LoadedModel(model=make_model(), tokenizer=tokenizer, name="tiny", revision=None)
    with pytest.raises(OSError, match=error.strerror or "away") as caught:
        train_method(recipe_of(random_answers=2, training=TRAINING), loaded, data, tmp_path)
    assert isinstance(caught.value, OutputError) is is_of_disk
    assert is_of_disk or caught.value is error
