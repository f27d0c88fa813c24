"""The certificate as a part of ``sku run`` and ``sku evaluate``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from conftest import MadeOnce
from sku.config import Recipe, load_recipe
from sku.errors import RecipeError
from sku.evaluate.comparison import PrecisionReport
from sku.pipeline.evaluate import run_evaluation
from sku.pipeline.run import FinishedRun, run_recipe

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread", "blank_pictures")]

SMALL = (
    "acquire.training.max_steps=2", "acquire.training.save_steps=2", "evaluate.prompts=3", "evaluate.retain_prompts=3",
    "evaluate.samples=0", "evaluate.max_new_tokens=8", "evaluate.attacks=[]", "negate.diagnostics=false",
    "negate.alpha=1.25", "data.forget.limit=120", "data.retain.limit=120",
)  # fmt: skip


def recipe(*changes: str) -> Recipe:
    return load_recipe("embedded", [*SMALL, "evaluate.precisions=[fp16, int8]", *changes])


def interrupt(stage: str, _done: int, _total: int) -> None:
    if stage == "int8 weights: replies":
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def resumed(made_once: MadeOnce) -> FinishedRun:
    """A run that was broken off between its two precisions, and gone on with."""

    def make(folder: Path) -> FinishedRun:
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe(), folder / "run", progress=interrupt)
        return run_recipe(recipe(), folder / "run", resume=True)

    finished: FinishedRun
    folder, finished = made_once("run_with_precisions", make)
    return dataclasses.replace(finished, folder=folder / "run")


def test_a_run_has_its_certificate(resumed: FinishedRun) -> None:
    report = resumed.precisions
    assert report is not None
    assert [result.precision for result in report.results] == ["fp16", "int8"]
    assert PrecisionReport.read(resumed.folder / "evaluation") == report
    manifest = json.loads((resumed.folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["certificate"] == json.loads(json.dumps(report.certificate()))
    assert "precisions" in manifest["seconds"]
    results = json.loads((resumed.folder / "results.json").read_text(encoding="utf-8"))
    assert PrecisionReport.from_dict(results["precisions"]) == report
    survival = report.results[1].survival
    assert survival is not None
    assert 0 < survival.changed <= 1
    assert len(survival.tensors) == 28, "seven linear layers in each of four"


def test_evaluating_the_same_model_gives_the_same_certificate(resumed: FinishedRun, tmp_path: Path) -> None:
    run_evaluation(recipe(), str(resumed.folder / "unlearned"), tmp_path / "alone")
    alone = PrecisionReport.read(tmp_path / "alone")
    assert resumed.precisions is not None
    assert (alone.results, alone.measured) == (resumed.precisions.results, resumed.precisions.measured)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"evaluate\.precisions\[0\] is 'nf5'.*Did you mean nf4\?"):
        recipe("evaluate.precisions=[nf5]")
