"""A small comparison on the embedded world: failures, resuming, and agreement with a single run."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from conftest import MadeOnce
from sku import comparison as comparison_run
from sku.comparison import comparison_rows, run_comparison, run_once
from sku.config import Recipe, load_recipe
from sku.config.check import content_sha256
from sku.errors import EvaluationError, OutputError, RecipeError
from sku.report.method_records import Comparison, read_records
from sku.storage import write_json

SMALL = (
    "data.forget.limit=80",
    "data.retain.limit=120",
    "acquire.training={max_steps: 2, per_device_train_batch_size: 2, learning_rate: 1.0e-4}",
    "acquire.random_answers=1",
    "evaluate={prompts: 3, retain_prompts: 6, max_new_tokens: 16, batch_size: 8, prefill_tokens: [1]}",
    "sweep={prompts: 3, retain_prompts: 6, alphas: [0.01]}",
)
BROKEN = '''"""A method whose loss is NaN."""
from dataclasses import dataclass
from sku.data.examples import RowPlan, RowType
from sku.methods.base import Method
from sku.training.objective import Objective

@dataclass(frozen=True, kw_only=True)
class Settings:
    """None."""

def objective(settings, model):
    def losses(step):
        return {"broken": step.rows(RowType.FORGET).mean_nll() * float("nan")}
    return Objective(rows=RowPlan(forget=True), weights={"broken": 1.0}, losses=losses)

BROKEN = Method(name="broken", title="Broken", paper_url="", settings=Settings, objective=objective)
'''
NAMES = ["fine_tune--seed0", "broken--seed0", "random_direction--seed0"]


@pytest.fixture(scope="module")
def small() -> Recipe:
    return load_recipe("embedded-paper", SMALL)


@pytest.fixture(scope="module")
def finished(small: Recipe, made_once: MadeOnce) -> Path:
    """FT, a method whose loss is NaN, and the random direction."""

    def make(folder: Path) -> None:
        (folder / "broken.py").write_text(BROKEN, encoding="utf-8")
        run_comparison(comparison_rows(small, ["fine_tune", str(folder / "broken.py")]), [0], folder / "out")

    folder, _ = made_once("comparison", make)
    return folder / "out"


@pytest.mark.integration
def test_one_method_that_fails_leaves_the_others_and_says_why(finished: Path) -> None:
    """The second run has the base's rows of the first."""
    compared = Comparison.read(finished)
    assert list(compared.failed) == ["broken--seed0"]
    assert {record.name: record.failure for record in read_records(finished)} == {
        "fine_tune": None, "broken": compared.failed["broken--seed0"], "random_direction": None, "base": None,
    }  # fmt: skip
    assert "broken" in compared.failed["broken--seed0"]
    asked = []
    for name in (NAMES[0], NAMES[2]):
        assert {path.name for path in (finished / name).iterdir()}.isdisjoint({"unlearned", "trained"})
        lines = (finished / name / "evaluation" / "base" / "generations.jsonl").read_text().splitlines()
        asked.append([line for line in lines if '"split"' in line and '"forget_test"' in line])
    assert asked[0] == asked[1] != []


@pytest.mark.integration
def test_a_second_call_keeps_what_stands_and_tries_again_what_failed(
    finished: Path, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    tried: list[str] = []

    def again(folder: Path, recipe: Recipe) -> str:
        tried.append(folder.name)
        return "once more"

    monkeypatch.setattr(comparison_run, "run_once", again)
    told: list[tuple[str, ...]] = []
    rows = comparison_rows(small, ["fine_tune", str(finished.parent / "broken.py")])
    run_comparison(rows, [0], out, lambda *words: told.append(words))
    assert tried == ["broken--seed0"]
    assert [state for _, state, _ in told] == ["kept", "failed", "kept"]
    run_comparison(comparison_rows(small, ["fine_tune"]), [0], out)
    assert Comparison.read(out).failed == {"broken--seed0": "once more"}, "rows of an earlier call stay"
    other = dataclasses.replace(rows[0], recipe=dataclasses.replace(small, seed=1, method="fine_tune"))
    with pytest.raises(OutputError, match="fine_tune--seed0"):
        run_comparison([other], [0], out)


@pytest.mark.integration
def test_runs_of_other_prompts_are_refused_together(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for file in ("outcomes.jsonl", "perplexity.jsonl"):
        path = out / NAMES[0] / "evaluation" / "unlearned" / file
        header, *rows = path.read_text(encoding="utf-8").splitlines()
        first = next(row for row in rows if '"forget_test"' in row)
        others = [row for row in rows if row != first]
        content = {**json.loads(header), "rows": len(others)}
        path.write_text("\n".join([json.dumps(content), *others]) + "\n", encoding="utf-8")
        with pytest.raises(EvaluationError, match="fine_tune--seed0"):
            read_records(out)
        path.write_text("\n".join([header, first, *others]) + "\n", encoding="utf-8")
    assert len(read_records(out)) == 4


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("data.harmful.final={path: x.csv}",), "harmful.final"),
        (("methods.npo.settings.bet=1",), "methods.npo.settings.bet"),
    ],
)
def test_what_can_not_be_compared_is_refused_before_anything_is_run(
    settings: tuple[str, ...], named: str, tmp_path: Path
) -> None:
    rows = comparison_rows(load_recipe("embedded-paper", [*SMALL, *settings]), ["npo"])
    with pytest.raises((RecipeError, EvaluationError), match=named):
        run_comparison(rows, [0], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_killed_or_interrupted(tmp_path: Path, small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed one is told of; an interrupt ends it, and the next call goes on with its folder."""
    started = MagicMock()
    process = started.return_value
    monkeypatch.setattr(subprocess, "Popen", started)
    folder = tmp_path / "sku--seed0"
    process.wait.return_value = -signal.SIGKILL
    assert "memory" in run_once(folder, small)
    assert load_recipe(tmp_path / "sku--seed0.yaml") == small
    process.wait.side_effect = [KeyboardInterrupt, -signal.SIGINT]
    with pytest.raises(KeyboardInterrupt):
        run_once(folder, small)
    process.terminate.assert_called_once()
    process.wait.side_effect = None
    folder.mkdir()
    write_json(folder / "manifest.json", {"status": "running", "recipe_sha256": content_sha256(small.to_dict())})
    run_once(folder, small)
    assert ["--resume" in call.args[0] for call in started.call_args_list] == [False, False, True]
