"""Relearning: what is trained and when it is looked at, which rate counts, and that it leaves nothing behind."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from sku.attacks import Relearned, relearn
from sku.attacks.relearn import CheckpointRow, fine_tune, training_details
from sku.evaluate.generation.prompts import draw_examples
from sku.evaluate.records import read_rows

from .conftest import World, world_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def relearned(
    world: World,
    folder: Path,
    rates: Sequence[float],
    steps: Sequence[int],
    pairs: Sequence[int] = (10,),
    **options: Any,
) -> Relearned:
    few = ("evaluate.attacks=[relearn]", "evaluate.attack_prompts=4")
    found = world.attack(folder, *few, relearning=(pairs, steps, rates), **options).relearn
    assert found is not None
    return found


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_no_setting_of_stage_1_but_what_is_trained_reaches_the_attack() -> None:
    own = training_details(world_recipe("acquire.tuning=lora"))
    changed = world_recipe(
        "acquire.tuning=lora", "acquire.lora.r=2", "acquire.training.learning_rate=0.5",
        "acquire.training.warmup_ratio=0.5", "acquire.training.per_device_train_batch_size=3",
        "acquire.training.weight_decay=0.1", "acquire.training.packing=flat", "acquire.random_answers=7",
    )  # fmt: skip
    assert training_details(changed) == own
    assert own["lora"]["r"] == 16
    assert "lora" not in training_details(world_recipe("acquire.tuning=full"))
    assert training_details(world_recipe("acquire.training.bf16=true"))["training"]["bf16"] is True


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_training_holds_the_shorter_ones_and_leaves_model_and_disk_as_they_were(
    tuning: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal seeds give equal weights; being looked at, or ending early, changes none."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    job: Any = SimpleNamespace(
        recipe=world_recipe(f"acquire.tuning={tuning}"), data=world.data, progress=None,
        generator=SimpleNamespace(encoder=SimpleNamespace(tokenizer=world.tokenizer)),
    )  # fmt: skip
    pairs = draw_examples(world.data.forget_train, 20, seed=0)
    before = weights_of(world.unlearned)

    def train(steps: Sequence[int], end: int = 99) -> dict[int, torch.Tensor]:
        found: dict[int, torch.Tensor] = {}

        def look(step: int, model: PreTrainedModel) -> bool:
            (folder,) = tmp_path.iterdir()
            assert folder.stat().st_mode & 0o777 == 0o700
            assert list(folder.rglob("*.safetensors")) == []
            found[step] = weights_of(model)
            with torch.no_grad():
                model.eval()(torch.tensor([[5, 6, 7]]))
            model.train()
            return step >= end

        fine_tune(world.unlearned, pairs, 1e-3, steps, job, look)
        assert list(tmp_path.iterdir()) == []
        return found

    whole, last, early = train((1, 2, 4)), train((4,)), train((2, 4, 8), end=4)
    assert [list(found) for found in (whole, last, early)] == [[1, 2, 4], [4], [2, 4]]
    assert torch.equal(whole[4], last[4])
    assert torch.equal(whole[2], early[2])
    assert torch.equal(whole[4], early[4])
    assert not torch.equal(whole[2], whole[4])
    assert torch.equal(weights_of(world.unlearned), before)


def test_half_of_the_harm_comes_back_and_the_training_ends_there(world: World, tmp_path: Path) -> None:
    found = relearned(world, tmp_path, (1e-3,), (1, 16, 64))
    assert (found.questions, found.base_harmful.count, found.half, found.steps) == (4, 4, 2, (1, 16, 64))
    (result,) = found.results
    line = result.model
    assert [checkpoint.steps for checkpoint in line.checkpoints] == [0, 1, 16]
    assert (line.half_steps, line.learning_rate, result.pairs, result.others) == (16, 1e-3, 10, ())
    assert [checkpoint.harmful.count >= 2 for checkpoint in line.checkpoints] == [False, False, True]
    assert all(checkpoint.perplexity and checkpoint.perplexity > 1 for checkpoint in line.checkpoints)
    assert [checkpoint.steps for checkpoint in result.control.checkpoints] == [0, 1, 16], "as far as the model's"
    assert result.control.half_steps == 0
    assert result.control.checkpoints[0].perplexity == 1
    assert {path.name for path in (tmp_path / "attacks").glob("relearn.*")} == {
        "relearn.model.10.0.001.jsonl", "relearn.control.10.0.001.jsonl",
    }  # fmt: skip


def test_the_rate_that_takes_the_fewest_steps_counts_and_slower_ones_are_cut(world: World, tmp_path: Path) -> None:
    found = relearned(world, tmp_path, (1e-9, 1e-3), (16, 64), (10, 10))
    (result,) = found.results
    assert (result.model.learning_rate, result.model.half_steps) == (1e-3, 16)
    (other,) = result.others
    assert (other.learning_rate, other.half_steps) == (1e-9, None)
    assert [checkpoint.steps for checkpoint in other.checkpoints] == [0, 16]


def test_a_model_that_has_half_needs_no_training_and_a_base_without_harm_has_no_half(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relearn, "fine_tune", None)
    (result,) = relearned(world, tmp_path / "a", (1e-3,), (4,), model=world.base).results
    assert (result.model.half_steps, result.model.learning_rate) == (0, None)
    assert result.model == result.control
    found = relearned(world, tmp_path / "b", (1e-3,), (4,), base=world.unlearned)
    assert (found.half, found.results) == (0, ())


def test_a_finished_training_is_reused_and_an_interrupted_one_starts_anew(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ((1e-9, 2e-9), (1, 2))
    trainings: list[float] = []

    def counting(model: Any, pairs: Any, learning_rate: float, *others: Any) -> None:
        trainings.append(learning_rate)
        fine_tune(model, pairs, learning_rate, *others)

    monkeypatch.setattr(relearn, "fine_tune", counting)
    whole = relearned(world, tmp_path / "whole", *changes)
    assert trainings == [2e-9, 1e-9, whole.results[0].model.learning_rate]

    def interrupt(stage: str, done: int, _total: int) -> None:
        if stage == "attack relearn: steps" and done == 2 and len(trainings) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        relearned(world, tmp_path / "broken", *changes, progress=interrupt)
    trainings.clear()
    assert relearned(world, tmp_path / "broken", *changes) == whole
    assert trainings[0] == 1e-9, "the first was finished"
    assert len(trainings) == 2
    for path in (tmp_path / "whole" / "attacks").glob("*.jsonl"):
        assert (tmp_path / "broken" / "attacks" / path.name).read_bytes() == path.read_bytes()
    _, rows = read_rows(tmp_path / "broken" / "attacks" / "relearn.model.10.1e-09.jsonl", CheckpointRow)
    assert [(row.id, len(row.replies)) for row in rows] == [("1", 4), ("2", 4)]
