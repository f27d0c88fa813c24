"""Reading a run folder: what is there is read, and what is broken is one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sku.errors import EvaluationError
from sku.report.page import run_page
from sku.report.read_run import RecordedRun, read_run

from .recorded import ASKED, PROMPTS, write, write_run

Break = Callable[[Path], None]


def test_everything_is_read(run: RecordedRun) -> None:
    assert run.comparison.replies["forget_test"]["harmful"].after.count == 2
    assert run.attacks is not None
    assert [entry["step"] for entry in run.log] == list(range(1, 31))
    assert run.pairs is not None
    assert len(run.pairs) == len(ASKED) * PROMPTS
    assert all(pair.base.record.id == pair.unlearned.record.id for pair in run.pairs)
    assert run.sweep is not None
    assert [point.alpha for point in run.sweep.points] == [0.5, 1, 1.5, 2, 4]
    third = run.sweep.points[2].replies
    assert third is not None
    assert (third.harmful.value, third.prefill[1].count, third.harm) == (0, 3, (1, third.prefill[1]))


def test_what_a_run_need_not_have(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "bare", parts=False)
    (folder / "training_log.jsonl").unlink()
    shutil.rmtree(folder / "evaluation")
    run = read_run(folder)
    assert (run.attacks, run.sweep, run.pairs, run.log) == (None, None, None, ())
    assert {"frontier", "training"}.isdisjoint(picture.name for picture in run_page(run).pictures)


def change(name: str, *keys: Any, to: Any) -> Break:
    """Sets one value deep in a JSON file."""

    def apply(folder: Path) -> None:
        content = place = json.loads((folder / name).read_text(encoding="utf-8"))
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to
        write(folder / name, content)

    return apply


def swap(folder: Path) -> None:
    """An evaluation of other prompts in place of the unlearned model's."""
    for name in ("generations.jsonl", "outcomes.jsonl"):
        path = folder / "evaluation" / "unlearned" / name
        path.write_text(path.read_text(encoding="utf-8").replace("-reply-1", "-reply-99"), encoding="utf-8")


def no_number(folder: Path) -> None:
    path = folder / "evaluation" / "base" / "outcomes.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"p_harmful": 0.9', '"p_harmful": NaN'), encoding="utf-8")


BROKEN: dict[str, tuple[Break, str]] = {
    "unfinished": (change("manifest.json", "status", to="running"), "not finished"),
    "no commit": (change("manifest.json", "environment", to={}), "manifest.json"),
    "another run's": (change("results.json", "manifest", "recipe_sha256", to="0"), "another recipe"),
    "no counts": (change("results.json", "base", "replies", to={"forget_test": {"harmful": {}}}), "base"),
    "no attacks": (change("results.json", "attacks", to={}), "attacks"),
    "no outcomes": (lambda folder: (folder / "evaluation/base/outcomes.jsonl").unlink(), "outcomes.jsonl"),
    "other prompts": (swap, "different prompts"),
    "no number": (no_number, "results.json"),
    "sweep under way": (change("sweep/sweep.json", "pick", to=None), "sweep.json"),
}


@pytest.mark.parametrize(("apply", "words"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_one_line(run_folder: Path, tmp_path: Path, apply: Break, words: str) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "run")
    apply(folder)
    with pytest.raises(EvaluationError) as caught:
        run_page(read_run(folder))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_folder_says_what_to_use(tmp_path: Path, run_folder: Path) -> None:
    for folder in (tmp_path / "nothing", run_folder / "results.json", run_folder / "evaluation" / "base"):
        with pytest.raises(EvaluationError, match="folder"):
            read_run(folder)
    (tmp_path / "comparison.json").write_text("{}", encoding="utf-8")
    with pytest.raises(EvaluationError, match="sku results"):
        read_run(tmp_path)
