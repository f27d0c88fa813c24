"""Settings of stage 1 and the call that runs it from a recipe."""

from __future__ import annotations

import errno
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import ModelMaker
from sku.acquire.config import SkuConfig
from sku.acquire.objective import TERMS, sku_objective
from sku.acquire.run import acquire, trainer_settings
from sku.config import AcquireConfig, DataConfig, LoraSettings, SourceConfig, WeightsConfig
from sku.data.examples import ForgetRetainData
from sku.errors import NonFiniteLossError, OutputError, RecipeError
from sku.models import LoadedModel
from sku.storage import is_marked_hazardous
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
        ({"guided_distortion_weight": -1.0}, "guided_distortion is -1.0"),
        ({"random_disassociation_weight": float("nan")}, "random_disassociation is nan"),
        ({"preservation_divergence_weight": float("inf")}, "preservation_divergence is inf"),
        ({f"{name}_weight": 0.0 for name in TERMS}, "are all 0"),
        ({"num_random_answers": 0}, "num_random_answers is 0"),
        ({"num_random_answers": -2}, "num_random_answers is -2"),
        ({"preservation_mode": "reverse"}, "must be divergence, retention or targeted"),
        ({"preservation_cap": 0.0}, "must be above 0 nats"),
        ({"preservation_tokens": "prompt"}, "must be answer or all"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"train_sampling_strategy": "random"}, "train_sampling_strategy must be sequential"),
        (
            {"dataloader_persistent_workers": True, "dataloader_num_workers": 1},
            "dataloader_persistent_workers must be False",
        ),
    ],
)
def test_settings_that_can_not_work_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        SkuConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_k_0_is_fine_where_the_module_is_off(tmp_path: Path) -> None:
    settings = SkuConfig(
        output_dir=str(tmp_path), use_cpu=True, num_random_answers=0, random_disassociation_weight=0.0
    )
    assert sku_objective(settings.modules()).rows.mismatched == 0
    assert sku_objective(settings.modules()).needs_reference


def test_every_setting_of_the_recipe_arrives(tmp_path: Path) -> None:
    config = AcquireConfig(
        weights=WeightsConfig(guided_distortion=1.5, random_disassociation=0.5, preservation_divergence=0.25),
        random_answers=3,
        preservation_mode="retention",
        preservation_cap=None,
        preservation_tokens="all",
        training=TRAINING,
    )
    settings = trainer_settings(config, SOURCES, seed=7, folder=tmp_path)
    assert (settings.guided_distortion_weight, settings.random_disassociation_weight) == (1.5, 0.5)
    assert (settings.preservation_divergence_weight, settings.preservation_mode) == (0.25, "retention")
    assert (settings.preservation_cap, settings.preservation_tokens) == (None, "all")
    assert (settings.num_random_answers, settings.seed, settings.max_steps) == (3, 7, 2)
    assert (settings.max_length, settings.max_answer_tokens) == (64, 16)
    assert settings.output_dir == str(tmp_path)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"learning_rat": 1e-3}, r"acquire.training.learning_rat is not a field .* Did you mean learning_rate\?"),
        ({"seed": 3}, "acquire.training.seed has its own place: set seed"),
        ({"output_dir": "x"}, "has its own place: set --out"),
        ({"num_random_answers": 3}, "has its own place: set acquire.random_answers"),
        ({"lr_scheduler_type": "zigzag"}, "acquire.training: .*zigzag"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"learning_rate": "small"}, "acquire.training.learning_rate is 'small'; it must be a number"),
    ],
)
def test_training_settings_that_can_not_work(training: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        trainer_settings(AcquireConfig(training=training), SOURCES, seed=0, folder=tmp_path)


def test_a_learning_rate_that_yaml_reads_as_text(tmp_path: Path) -> None:
    """YAML 1.1 takes 2e-4 for text."""
    settings = trainer_settings(AcquireConfig(training={"learning_rate": "2e-4"}), SOURCES, seed=0, folder=tmp_path)
    assert settings.learning_rate == 2e-4


def test_the_adapter_of_each_tuning() -> None:
    assert adapter_settings(AcquireConfig(tuning="full")) is None
    settings = adapter_settings(
        AcquireConfig(lora=LoraSettings(r=4, alpha=9, dropout=0.25, target_modules=("q_proj", "v_proj")))
    )
    assert isinstance(settings, LoraConfig)
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (4, 9, 0.25)
    assert set(settings.target_modules or ()) == {"q_proj", "v_proj"}
    everything = adapter_settings(AcquireConfig(tuning="qlora"))
    assert isinstance(everything, LoraConfig)
    assert everything.target_modules == "all-linear"


@pytest.fixture
def loaded(make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    return LoadedModel(model=make_model(), tokenizer=tokenizer, name="tiny", revision=None)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_acquire_trains_and_keeps_its_folder_private(
    tuning: Any, loaded: LoadedModel, data: ForgetRetainData, tmp_path: Path, make_model: ModelMaker
) -> None:
    folder = tmp_path / "acquire"
    config = AcquireConfig(tuning=tuning, random_answers=2, training=TRAINING)
    acquired = acquire(loaded, data, config, SOURCES, seed=0, folder=folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert is_marked_hazardous(folder)
    assert [entry["step"] for entry in acquired.log] == [1, 2]
    assert all(f"loss/{name}" in entry for entry in acquired.log for name in TERMS)
    assert set(acquired.reports) == {"unlearned", "retain_train"}
    assert acquired.reports["unlearned"].kept == 6
    assert acquired.seconds > 0
    assert not acquired.model.training
    original = make_model().state_dict()
    if tuning == "lora":
        assert isinstance(acquired.model, PeftModel)
        plain = acquired.model.unload().state_dict()
        assert all(torch.equal(plain[name], weight) for name, weight in original.items())
    else:
        assert isinstance(acquired.model, PreTrainedModel)
        assert any(not torch.equal(acquired.model.state_dict()[name], weight) for name, weight in original.items())


def test_acquire_resumes_from_the_last_checkpoint_in_its_folder(
    loaded: LoadedModel, data: ForgetRetainData, tmp_path: Path, make_model: ModelMaker
) -> None:
    training = TRAINING | {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    config = AcquireConfig(random_answers=2, training=training | {"max_steps": 1})
    acquire(loaded, data, config, SOURCES, seed=0, folder=tmp_path)
    again = LoadedModel(model=make_model(), tokenizer=loaded.tokenizer, name="tiny", revision=None)
    longer = AcquireConfig(random_answers=2, training=training | {"max_steps": 3})
    resumed = acquire(again, data, longer, SOURCES, seed=0, folder=tmp_path)
    assert [entry["step"] for entry in resumed.log] == [1, 2, 3]
    fresh = LoadedModel(model=make_model(), tokenizer=loaded.tokenizer, name="tiny", revision=None)
    whole = acquire(fresh, data, longer, SOURCES, seed=0, folder=tmp_path / "other")
    for (name, here), there in zip(resumed.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(here, there), name


def test_a_full_disk_while_a_checkpoint_is_written_is_one_line(
    loaded: LoadedModel, data: ForgetRetainData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(UnlearningTrainer, "_save_checkpoint", full_disk)
    config = AcquireConfig(random_answers=2, training=TRAINING | {"save_strategy": "steps", "save_steps": 1})
    with pytest.raises(OutputError, match="a checkpoint can't be written to .*No space left on device"):
        acquire(loaded, data, config, SOURCES, seed=0, folder=tmp_path)


@pytest.mark.parametrize(
    ("error", "is_of_disk"),
    [
        (OSError(errno.EROFS, "Read-only file system"), True),
        (PermissionError(errno.EACCES, "Permission denied", "optimizer.pt"), True),  # Relative to an open folder.
        (OSError(errno.EMFILE, "Too many open files", "{folder}/checkpoint-1/optimizer.pt"), True),
        (OSError(errno.EMFILE, "Too many open files"), False),
        (PermissionError(errno.EACCES, "Permission denied", "/elsewhere/wandb"), False),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), False),
        (ConnectionError("the service is away"), False),
    ],
    ids=repr,
)
def test_only_what_a_disk_refuses_is_a_checkpoint_that_can_not_be_written(
    error: OSError, is_of_disk: bool, loaded: LoadedModel, data: ForgetRetainData, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if error.filename:
        error.filename = error.filename.format(folder=tmp_path)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(UnlearningTrainer, "train", fail)
    with pytest.raises(OSError, match=error.strerror or "away") as caught:
        acquire(loaded, data, AcquireConfig(random_answers=2, training=TRAINING), SOURCES, seed=0, folder=tmp_path)
    assert isinstance(caught.value, OutputError) is is_of_disk
    assert is_of_disk or caught.value is error


def test_errors_of_stage_1_keep_their_kind(loaded: LoadedModel, data: ForgetRetainData, tmp_path: Path) -> None:
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError):
        acquire(loaded, data, AcquireConfig(random_answers=2, training=TRAINING), SOURCES, seed=0, folder=tmp_path)
