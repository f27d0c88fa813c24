"""Relearning: what the recipe trains with, and that it brings back what a task vector took away."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.attacks.kinds import RELEARN, AttackContext, relearn_training, relearned
from sku.config import Recipe
from sku.data.examples import ForgetRetainData, normalise_prompt
from sku.evaluate.asking import draw_examples

from .conftest import world_recipe


def context_of(
    recipe: Recipe, data: ForgetRetainData, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> AttackContext:
    return AttackContext(recipe=recipe, data=data, model=model, tokenizer=tokenizer)


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_settings_are_the_numbers_of_pairs_that_there_are(
    world_data: ForgetRetainData, world_base: PreTrainedModel, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    recipe = world_recipe("evaluate.relearn_pairs=[3, 1, 100000, 200000]")
    settings = RELEARN.settings(context_of(recipe, world_data, world_base, world_tokenizer))
    everything = len({normalise_prompt(example.prompt) for example in world_data.forget_train})
    assert [setting.name for setting in settings] == ["3 pairs", "1 pair", f"{everything} pairs"]
    assert [setting.details["pairs"] for setting in settings] == [3, 1, everything]
    assert len({setting.details["pairs_sha256"] for setting in settings}) == 3


@pytest.mark.parametrize(
    ("change", "decides"),
    [
        ("acquire.lora.r=2", True),
        ("acquire.lora.alpha=5", True),
        ("acquire.lora.dropout=0.5", True),
        ("acquire.lora.target_modules=[q_proj]", True),
        ("data.max_length=77", True),
        ("data.max_answer_tokens=9", True),
        ("evaluate.batch_size=3", False),
    ],
)
def test_details_tell_all_that_decides_the_weights(
    change: str,
    decides: bool,
    world_data: ForgetRetainData,
    world_base: PreTrainedModel,
    world_tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Replies are reused where details are equal; full fine-tuning has no adapter."""

    def details(*changes: str) -> Mapping[str, Any]:
        recipe = world_recipe("evaluate.relearn_pairs=[3]", *changes)
        (setting,) = RELEARN.settings(context_of(recipe, world_data, world_base, world_tokenizer))
        return setting.details

    lora, full = "acquire.tuning=lora", "acquire.tuning=full"
    assert (details(lora, change) != details(lora)) is decides
    assert (details(full, change) != details(full)) is (decides and "lora" not in change)
    assert json.loads(json.dumps(details(lora, change))) == details(lora, change)


def test_training_is_the_recipes_but_for_steps_warm_up_and_checkpoints() -> None:
    training = relearn_training(
        world_recipe(
            "acquire.training.warmup_steps=70", "acquire.training.warmup_ratio=0.5", "evaluate.relearn_steps=7"
        )
    )
    assert training == {
        "max_steps": 7, "warmup_steps": 0, "save_strategy": "no", "save_steps": 50, "save_total_limit": 1,
        "per_device_train_batch_size": 8, "learning_rate": 3.0e-4, "lr_scheduler_type": "cosine",
    }  # fmt: skip


@pytest.mark.parametrize("tuning", ["full", "lora", "qlora"])
def test_equal_seeds_relearn_equal_weights_and_leave_the_model_and_the_disk_as_they_were(
    tuning: str,
    world_data: ForgetRetainData,
    world_unlearned: PreTrainedModel,
    world_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    recipe = world_recipe(f"acquire.tuning={tuning}", "evaluate.relearn_steps=2", "evaluate.relearn_pairs=[4]")
    context = context_of(recipe, world_data, world_unlearned, world_tokenizer)
    (setting,) = RELEARN.settings(context)
    before, found = weights_of(world_unlearned), []
    for _ in range(2):
        with setting.change(world_unlearned) as model:
            (folder,) = tmp_path.iterdir()
            assert folder.stat().st_mode & 0o777 == 0o700
            assert list(folder.rglob("*.safetensors")) == []
            assert not model.training
            found.append(weights_of(model))
        assert list(tmp_path.iterdir()) == []
    assert torch.equal(found[0], found[1])
    assert torch.equal(weights_of(world_unlearned), before)
    assert len(found[0]) > len(before) or not torch.equal(found[0], before)


def test_the_pairs_alone_are_learned(
    world_data: ForgetRetainData, world_unlearned: PreTrainedModel, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Another draw of pairs gives other weights: what is trained on is what was drawn."""
    recipe = world_recipe("evaluate.relearn_steps=2")
    context = context_of(recipe, world_data, world_unlearned, world_tokenizer)
    found = []
    for seed in (0, 1):
        with relearned(world_unlearned, draw_examples(world_data.forget_train, 4, seed=seed), context) as model:
            found.append(weights_of(model))
    assert not torch.equal(*found)
