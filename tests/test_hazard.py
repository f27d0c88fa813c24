"""The mark on a bad model in memory: it goes wherever the model is saved, and the model goes nowhere else."""

from __future__ import annotations

import copy
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import ModelMaker, TrainerMaker
from sku.config import load_recipe
from sku.data.load import load_recipe_data
from sku.errors import OutputError
from sku.hazard import is_marked_model
from sku.methods import method_named
from sku.methods.run import train_method
from sku.models import load_model
from sku.negate.adapters import AdapterVector, load_adapter
from sku.negate.streaming import negate_folders
from sku.negate.task_vector import negate
from sku.storage import BAD_MODEL_MARK, HAZARD_KEY, hazardous_folders, is_marked_hazardous

pytestmark = pytest.mark.usefixtures("one_thread")

Way = Callable[[Any, Path], None]
WITH_ADAPTER: dict[str, Way] = {
    "trainer": lambda trainer, folder: trainer.save_model(str(folder)),
    "model": lambda trainer, folder: trainer.model.save_pretrained(folder),
    "deep copy": lambda trainer, folder: copy.deepcopy(trainer.model).save_pretrained(folder),
    "model inside": lambda trainer, folder: trainer.model.get_base_model().save_pretrained(folder),
    "body inside": lambda trainer, folder: trainer.model.get_base_model().model.save_pretrained(folder),
    "merged": lambda trainer, folder: trainer.model.merge_and_unload().save_pretrained(folder),
    "merged in place": lambda trainer, folder: merged_in_place(trainer).save_pretrained(folder),
}
OF_ALL_WEIGHTS: dict[str, Way] = {name: WITH_ADAPTER[name] for name in ("trainer", "model", "deep copy")}


def merged_in_place(trainer: Any) -> Any:
    trainer.model.merge_adapter()
    return trainer.model.get_base_model()


def says_it(folder: Path) -> bool:
    """Whether a configuration in a folder holds the mark."""
    files = [folder / name for name in ("config.json", "adapter_config.json") if (folder / name).is_file()]
    assert files
    return any(json.loads(path.read_text(encoding="utf-8")).get(HAZARD_KEY) is True for path in files)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """Whatever is asked of it; every question fails."""
    asked = MagicMock(side_effect=ConnectionError)
    for name in ("create_repo", "upload_folder", "create_commit"):
        monkeypatch.setattr(HfApi, name, asked)
    return asked


@pytest.mark.parametrize(
    ("full", "way"), [*((False, way) for way in WITH_ADAPTER), *((True, way) for way in OF_ALL_WEIGHTS)]
)
def test_every_way_of_saving_marks_and_makes_private(
    full: bool, way: str, make_trainer: TrainerMaker, tmp_path: Path
) -> None:
    trainer = make_trainer(full=full, max_steps=1)
    trainer.train()
    WITH_ADAPTER[way](trainer, tmp_path / "saved")
    assert (tmp_path / "saved" / BAD_MODEL_MARK).is_file()
    assert stat.S_IMODE((tmp_path / "saved").stat().st_mode) == 0o700
    assert hazardous_folders(tmp_path) == [tmp_path / "saved"]
    (tmp_path / "saved" / BAD_MODEL_MARK).unlink()
    assert says_it(tmp_path / "saved")
    assert hazardous_folders(tmp_path) == [tmp_path / "saved"], "its configuration alone is enough"


def test_what_others_write_from_the_configurations_is_marked(
    make_model: ModelMaker, make_trainer: TrainerMaker, tmp_path: Path
) -> None:
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer: Any = make_trainer(get_peft_model(make_model(), adapter, "bad"), full=True, max_steps=1)
    trainer.train()
    trainer.model.config.save_pretrained(tmp_path / "config")
    trainer.model.peft_config["bad"].save_pretrained(str(tmp_path / "adapter"))
    trainer.save_model(str(tmp_path / "saved"))
    assert all(says_it(tmp_path / place) for place in ("config", "adapter", "saved/bad"))


@pytest.mark.parametrize("full", [False, True])
def test_checkpoints_are_marked_before_there_is_anything_in_them(
    full: bool, make_trainer: TrainerMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(full=full, max_steps=1, save_strategy="steps", save_steps=1)
    kind: Any = type(trainer.model)
    marked = []

    def save_pretrained(_model: Any, folder: Any, **_options: Any) -> None:
        marked.append((Path(folder).name, is_marked_hazardous(Path(folder))))
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(kind, "save_pretrained", save_pretrained)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert marked == [("checkpoint-1", True)]


@pytest.mark.parametrize("full", [False, True])
def test_nothing_of_it_is_uploaded(full: bool, make_trainer: TrainerMaker, tmp_path: Path, hub: MagicMock) -> None:
    trainer: Any = make_trainer(full=full, max_steps=1)
    trainer.train()
    pushed = [trainer.model] if full else [trainer.model, trainer.model.get_base_model()]
    for push in (
        trainer.push_to_hub,
        *(lambda model=model: model.push_to_hub("someone/something") for model in pushed),
        *(lambda model=model: model.save_pretrained(tmp_path / "new", push_to_hub=True) for model in pushed),
        *([] if full else [lambda: trainer.model.merge_and_unload().push_to_hub("someone/something")]),
    ):
        with pytest.raises(OutputError, match=HAZARD_KEY) as caught:
            push()
        assert "\n" not in str(caught.value)
    hub.assert_not_called()
    assert not (tmp_path / "new").exists()


def in_memory(trainer: Any, make_model: ModelMaker, _folder: Path) -> Any:
    """Of an adapter, ``unload`` gives the original back, without the mark."""
    bad = copy.deepcopy(trainer.model)
    original = trainer.model.unload() if isinstance(bad, PeftModel) else make_model()
    weights = make_model().state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in original.state_dict().items())
    assert not is_marked_model(original)
    return negate(original, bad)


def streamed(trainer: Any, make_model: ModelMaker, folder: Path) -> Any:
    make_model().save_pretrained(folder / "base")
    trainer.model.save_pretrained(folder / "bad")
    negate_folders(folder / "base", folder / "bad", folder / "out")
    assert not is_marked_hazardous(folder / "out")
    return AutoModelForCausalLM.from_pretrained(folder / "out")


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("unlearn", [in_memory, streamed])
def test_the_unlearned_model_carries_no_mark(
    full: bool, unlearn: Any, make_trainer: TrainerMaker, make_model: ModelMaker, tmp_path: Path, hub: MagicMock
) -> None:
    trainer = make_trainer(full=full, max_steps=1)
    trainer.train()
    unlearned = unlearn(trainer, make_model, tmp_path)
    assert not is_marked_model(unlearned)
    unlearned.save_pretrained(tmp_path / "unlearned")
    assert not is_marked_hazardous(tmp_path / "unlearned")
    assert HAZARD_KEY not in (tmp_path / "unlearned" / "config.json").read_text(encoding="utf-8")
    with pytest.raises(ConnectionError):  # It may go where its owner wants.
        unlearned.push_to_hub("someone/something")
    hub.assert_called_once()


def test_a_negated_adapter_carries_no_mark_and_one_that_adds_does(make_trainer: TrainerMaker, tmp_path: Path) -> None:
    trainer: Any = make_trainer(max_steps=1)
    trainer.train()
    for alpha, marked in ((1.0, False), (-1.0, True)):
        (-alpha * AdapterVector.of(trainer.model)).save(tmp_path / str(alpha), hazardous=marked)
        assert is_marked_hazardous(tmp_path / str(alpha)) is marked
        assert says_it(tmp_path / str(alpha)) is marked
    trainer.save_model(str(tmp_path / "bad"))
    assert says_it(tmp_path / "bad")


@pytest.mark.parametrize(
    ("name", "tuning"), [("sku", "lora"), ("task_vector", "full"), ("fine_tune", "lora"), ("gradient_ascent", "full")]
)
def test_only_methods_whose_trained_model_is_hazardous_mark_it(name: str, tuning: str, tmp_path: Path) -> None:
    recipe = load_recipe(
        "embedded", [f"method={name}", f"acquire.tuning={tuning}", "acquire.training.max_steps=1", "negate.alpha=1"]
    )
    trained = train_method(recipe, load_model("embedded"), load_recipe_data(recipe), tmp_path / "checkpoints")
    assert isinstance(trained.model, (PreTrainedModel, PeftModel))
    assert is_marked_model(trained.model) is method_named(name).negates
    trained.save(tmp_path / "saved")
    assert is_marked_hazardous(tmp_path / "saved") is method_named(name).negates


@pytest.mark.parametrize("full", [False, True])
def test_a_bad_model_that_is_loaded_again_is_marked(
    full: bool, make_trainer: TrainerMaker, make_model: ModelMaker, tmp_path: Path, hub: MagicMock
) -> None:
    trainer: Any = make_trainer(full=full, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "bad"))
    loaded: Any = load_model(tmp_path / "bad").model if full else load_adapter(make_model(), tmp_path / "bad")
    with pytest.raises(OutputError, match=HAZARD_KEY):
        loaded.push_to_hub("someone/something")
    hub.assert_not_called()
    again = loaded.merge_and_unload() if isinstance(loaded, PeftModel) else loaded
    again.save_pretrained(tmp_path / "again")
    assert is_marked_hazardous(tmp_path / "again")
