"""Runs that choose their alpha, and sweeps with a bad model that is there or trained first."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import Command, MadeOnce, assert_same_bits
from sku.config import Recipe, load_recipe
from sku.errors import EvaluationError, ModelError, NoAlphaError, OutputError, RecipeError
from sku.models import load_model
from sku.negate.task_vector import negate
from sku.pipeline.run import run_recipe
from sku.pipeline.stages import run_acquire, run_sweep
from sku.storage import is_marked_hazardous
from sku.sweep import Selection
from sku.sweep.run import TRAINED_ON, UNKNOWN_TRAINING, Training

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread", "blank_pictures")]

SMALL = (
    "acquire.training={max_steps: 3, per_device_train_batch_size: 4, learning_rate: 1.0e-2}",
    "acquire.random_answers=1",
    "evaluate={prompts: 2, retain_prompts: 3, max_new_tokens: 12, batch_size: 16, samples: 0, prefill_tokens: []}",
    "sweep={alphas: [0.25, 0.5], prompts: 4, retain_prompts: 6}",
    "sweep.harm_target=", "sweep.if_none=nearest", "sweep.utility_budget=1.0e+9",
)  # fmt: skip
STRICT = ("sweep.if_none=stop", "sweep.harm_target=0.0", "sweep.alphas=[0.001]")
"""Nothing is unlearned at such an alpha."""


@pytest.fixture(scope="module", autouse=True)
def any_reply_will_do() -> Iterator[None]:
    """Of a model that was trained for three steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sku.sweep.REPLY_LIMIT", 0.99)
        yield


def recipe(*changes: str) -> Recipe:
    return load_recipe("embedded-paper", [*SMALL, *changes])


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def interrupt_at(stage: str, at: int) -> Callable[[str, int, int], None]:
    def progress(name: str, done: int, total: int) -> None:
        if name == stage and done >= at:
            raise KeyboardInterrupt

    return progress


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sku.report.figures.Picture.save", lambda *_: [])


@pytest.fixture(scope="module")
def finished(made_once: MadeOnce) -> Path:
    """A run that chose its alpha and kept its bad model."""
    folder, _ = made_once("run_with_sweep", lambda place: run_recipe(recipe("keep_bad_model=true"), place / "run"))
    return folder / "run"


def test_a_run_records_alpha_and_why_and_saves_that_model(finished: Path) -> None:
    manifest, found = read(finished / "manifest.json"), read(finished / "sweep" / "sweep.json")
    assert manifest["sweep"] == found["pick"]
    assert manifest["sweep"]["why"]
    assert manifest["negation"]["alpha"] == found["pick"]["alpha"]
    assert manifest["recipe"]["negate"]["alpha"] == "auto"
    assert manifest["seconds"]["sweep"] > 0
    assert manifest["data"]["splits"]["forget_validation"] == 195
    assert (finished / "sweep" / "frontier.png").is_file()
    by_hand = negate(load_model("embedded").model, finished / "bad" / "final", found["pick"]["alpha"]).state_dict()
    saved = weights(finished / "unlearned")
    assert_same_bits(saved, {name: by_hand[name] for name in saved})


def test_a_run_equals_one_with_that_alpha(finished: Path, tmp_path: Path) -> None:
    alpha = read(finished / "manifest.json")["sweep"]["alpha"]
    fixed = run_recipe(recipe(f"negate.alpha={alpha}"), tmp_path / "run")
    assert_same_bits(weights(finished / "unlearned"), weights(fixed.folder / "unlearned"))
    assert "forget_validation" not in fixed.manifest["data"]["splits"]
    assert not (fixed.folder / "sweep").exists()


def test_a_run_killed_at_its_sweep_goes_on_there(finished: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "run", recipe("keep_bad_model=true")
    with pytest.raises(KeyboardInterrupt):
        run_recipe(settings, out, progress=interrupt_at("sweep: alphas", 1))
    asked: list[int] = []
    resumed = run_recipe(
        settings, out, resume=True,
        progress=lambda name, done, total: asked.append(done) if name == "sweep: replies" and done == total else None,
    )  # fmt: skip
    assert len(asked) == 2, "the base's own replies, whose text a sweep does not keep, and the alpha that was missing"
    assert_same_bits(weights(out / "unlearned"), weights(finished / "unlearned"))
    assert resumed.manifest["sweep"] == read(finished / "manifest.json")["sweep"]
    assert (out / "sweep" / "sweep.json").read_bytes() == (finished / "sweep" / "sweep.json").read_bytes()


def test_where_no_alpha_will_do_the_run_stops_and_its_sweep_stays(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(NoAlphaError):
        run_recipe(recipe(*STRICT), out)
    assert read(out / "manifest.json")["status"] == "no_alpha"
    assert read(out / "sweep" / "sweep.json")["pick"]["met"] is False
    assert not (out / "unlearned").exists()
    assert not (out / "bad").exists()
    with pytest.raises(NoAlphaError):
        run_recipe(recipe(*STRICT), out, resume=True)


def test_a_sweep_with_a_kept_bad_model_chooses_as_the_run_did(finished: Path, tmp_path: Path) -> None:
    bad = finished / "bad" / "final"
    before = {path.name: path.stat().st_mtime_ns for path in bad.iterdir()}
    found = run_sweep(recipe(), tmp_path / "sweep", bad=bad)
    assert found.to_dict() == read(finished / "sweep" / "sweep.json")
    assert {path.name: path.stat().st_mtime_ns for path in bad.iterdir()} == before


def test_a_sweep_trains_first_and_leaves_no_bad_model(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    with pytest.raises(KeyboardInterrupt):
        run_sweep(recipe("negate.alpha=1.0"), out, progress=interrupt_at("sweep: alphas", 1))
    assert is_marked_hazardous(out / "bad")
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE((out / "bad").stat().st_mode) == 0o700
    with pytest.raises(OutputError):
        run_sweep(recipe("seed=1"), out)
    found = run_sweep(recipe("negate.alpha=1.0"), out)
    assert found.to_dict() == read(finished / "sweep" / "sweep.json")
    assert {path.name for path in out.iterdir()} == {"sweep.json"}


def test_a_bad_model_that_may_have_seen_the_prompts_is_noted(finished: Path, tmp_path: Path) -> None:
    known = tmp_path / "bad"
    run_acquire(recipe(), known)
    (starts,) = run_sweep(recipe(), tmp_path / "one", bad=known).notes
    assert starts.startswith("the prefill of ")
    other = run_sweep(recipe("data.forget.limit=80"), tmp_path / "two", bad=known)
    assert other.notes[-2].startswith(TRAINED_ON)
    (known / Training.FILE).unlink()
    assert run_sweep(recipe(), tmp_path / "one", bad=known).notes[-2].startswith(UNKNOWN_TRAINING)
    (known / Training.FILE).write_text('{"recipe": 3}', encoding="utf-8")
    with pytest.raises(EvaluationError):
        run_sweep(recipe(), tmp_path / "one", bad=known)


def test_what_can_not_be_swept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        run_sweep(recipe("method=npo"), tmp_path / "sweep")
    with pytest.raises(ModelError):
        run_sweep(recipe(), tmp_path / "sweep", bad=tmp_path / "none")
    with pytest.raises(RecipeError):
        run_sweep(recipe("acquire.training={max_step: 3}"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_command_says_what_comes_next_or_ends_with_one_error_line(
    finished: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sku.sweep.run.choose", lambda _: Selection(alpha=0.25, met=True, why="it is"))
        done = command("sweep", finished, "--out", tmp_path / "s")
    assert done.code == 0, done.err
    assert f"next      sku negate embedded {finished / 'bad' / 'final'} --alpha 0.25 --out {tmp_path}" in done.out
    changes = [word for change in STRICT for word in ("--set", change)]
    done = command("sweep", finished, "--out", tmp_path / "s", *changes)
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("error: none of 1 alphas brings harm to 0 %")
    assert "nearest   none of 1 alphas" in done.out
    assert read(tmp_path / "s" / "sweep.json")["pick"]["met"] is False
