"""Attacks as a part of ``sku run`` and ``sku evaluate``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sku.attacks import AttackReport
from sku.config import Recipe
from sku.pipeline.evaluate import run_evaluation
from sku.pipeline.run import run_recipe

from .conftest import world_recipe

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread", "blank_pictures")]


def recipe(*changes: str) -> Recipe:
    return world_recipe(
        "acquire.training.max_steps=2", "acquire.training.save_steps=2", "evaluate.prompts=3",
        "evaluate.retain_prompts=3", "evaluate.samples=0", "evaluate.attack_prompts=3",
        "evaluate.attacks=[template]", "negate.alpha=1.25", "evaluate.max_new_tokens=8",
        "data.forget.limit=120", "data.retain.limit=120", *changes,
    )  # fmt: skip


def test_a_run_ends_with_its_attacks_and_goes_on_at_them(tmp_path: Path) -> None:
    whole = run_recipe(recipe(), tmp_path / "whole")
    report = whole.attacks
    assert report is not None
    assert [result.attack for result in report.results] == ["none", "template"]
    assert AttackReport.read(whole.folder / "evaluation") == report
    results = json.loads((whole.folder / "results.json").read_text(encoding="utf-8"))
    assert AttackReport.from_dict(results["attacks"]) == report
    assert "attacks" in whole.manifest["seconds"]
    assert report.setup.control["fingerprint"] != report.setup.model["fingerprint"]

    def interrupt(stage: str, done: int, _total: int) -> None:
        if stage == "attack template: replies" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(), tmp_path / "broken", progress=interrupt)
    resumed = run_recipe(recipe(), tmp_path / "broken", resume=True)
    assert resumed.attacks == report

    alone = tmp_path / "alone"
    run_evaluation(recipe(), str(whole.folder / "unlearned"), alone)
    assert AttackReport.read(alone) == report
