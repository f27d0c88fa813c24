"""``activation_checkpointing: auto``: what is decided, that a run trains so, and that a resumed one keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sku import memory
from sku.config import Recipe, load_recipe
from sku.memory import GIB
from sku.methods.run import train_method
from sku.pipeline import unlearning
from sku.pipeline.run import plan_run
from sku.pipeline.stages import run_acquire
from sku.training.config import UnlearningConfig
from sku.training.trainer import UnlearningTrainer

TINY = [
    "acquire.training.max_steps=2", "acquire.training.save_steps=1", "acquire.training.activation_checkpointing=auto",
    "acquire.training.per_device_train_batch_size=4", "evaluate.prompts=3", "evaluate.retain_prompts=3",
    "evaluate.max_new_tokens=4", "evaluate.samples=0", "evaluate.prefill_tokens=[]", "negate.alpha=1.0",
    "sweep.prompts=3", "sweep.retain_prompts=3",
]  # fmt: skip


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("embedded", TINY)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What each trainer is told."""
    found: list[bool] = []
    before = UnlearningTrainer.train

    def train(self: UnlearningTrainer, *arguments: Any, **options: Any) -> Any:
        found.append(bool(self.args.activation_checkpointing))
        return before(self, *arguments, **options)

    monkeypatch.setattr(UnlearningTrainer, "train", train)
    return found


def free(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    monkeypatch.setattr(memory, "_free_memory", lambda: int(gib * GIB))


@pytest.mark.parametrize(("gib", "on"), [(1000, False), (0.1, True)])
def test_it_is_on_only_where_stage_1_does_not_fit_without_it(
    recipe: Recipe, used: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gib: float, *, on: bool
) -> None:
    free(monkeypatch, gib)
    decided = memory.decide_checkpointing(recipe)
    assert decided is not None
    assert decided.on is on
    assert f"{gib:.1f} GiB are free on cpu" in decided.why
    plan = plan_run(recipe, tmp_path / "run")
    assert plan.settings["activation checkpointing"] == decided.line
    assert plan.memory is not None
    assert plan.memory().fits is not on
    run_acquire(recipe, tmp_path / "bad")
    assert used == [on]


def test_nothing_is_decided_for_a_recipe_that_says_it_and_without_an_estimate_it_is_on(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for value in ("true", "false"):
        said = load_recipe("embedded", [*TINY, f"acquire.training.activation_checkpointing={value}"])
        assert memory.decide_checkpointing(said) is None
    other = memory.decide_checkpointing(load_recipe("embedded", [*TINY, "method=npo"]))
    assert other == memory.Checkpointing(
        on=True, why="without it, no estimate of memory: it is of stage 1 of sku, and the recipe's method is npo"
    )
    monkeypatch.setattr(memory, "pick_device", lambda _: torch.device("mps"))
    assert memory.decide_checkpointing(recipe) == memory.Checkpointing(
        on=True, why="without it, no estimate of memory: what is free on mps is not known"
    )
    alone = UnlearningConfig(output_dir=str(tmp_path), use_cpu=True, activation_checkpointing="auto")
    assert alone.activation_checkpointing is True


def test_a_resumed_run_trains_as_it_began_whatever_is_free_then(
    recipe: Recipe, used: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    free(monkeypatch, 1000)
    monkeypatch.setattr(unlearning, "train_method", killed)
    with pytest.raises(KeyboardInterrupt):
        plan_run(recipe, out).execute(None)
    noted = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["activation_checkpointing"]
    assert noted["on"] is False
    assert "1000.0 GiB are free" in noted["why"]
    free(monkeypatch, 0.1)
    monkeypatch.setattr(unlearning, "train_method", train_method)
    plan = plan_run(recipe, out, resume=True)
    assert plan.settings["activation checkpointing"] == f"off: {noted['why']}"
    done = plan.execute(None)
    assert used == [False]
    assert done.manifest["activation_checkpointing"] == noted
    assert done.manifest["recipe"]["acquire"]["training"]["activation_checkpointing"] == "auto"
