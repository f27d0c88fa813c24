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
    assert run.title == "invented"
    assert run.comparison.replies["forget_test"]["harmful"].after.count == 2
    assert run.attacks is not None
    assert [result.setting for result in run.attacks.results] == ["", ""]
    assert [entry["step"] for entry in run.log] == list(range(1, 31))
    assert set(run.log[0]) == {"step", "loss", "loss/guided_distortion"}
    assert run.pairs is not None
    assert len(run.pairs) == len(ASKED) * PROMPTS
    assert all(pair.base.record.id == pair.unlearned.record.id for pair in run.pairs)
    assert run.sweep is not None
    assert run.sweep.pick is not None
    assert [point.alpha for point in run.sweep.points] == [0.5, 1, 1.5, 2, 4]
    assert run.sweep.pick.alpha == 1.5
    third, last = run.sweep.points[2].replies, run.sweep.points[-1]
    assert third is not None
    assert (third.harmful.value, third.prefill[1].count, third.harm) == (0, 3, (1, third.prefill[1]))
    assert (last.perplexity, last.unasked) == (None, "the weights are not finite")


def test_what_a_run_need_not_have(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "bare", parts=False)
    (folder / "training_log.jsonl").unlink()
    shutil.rmtree(folder / "evaluation")
    run = read_run(folder)
    assert (run.attacks, run.sweep, run.pairs, run.log) == (None, None, None, ())
    assert {"frontier", "training", "task_vector"}.isdisjoint(picture.name for picture in run_page(run).pictures)


def change(name: str, *keys: Any, to: Any) -> Break:
    """Sets one value deep in a JSON file."""

    def apply(folder: Path) -> None:
        content = place = json.loads((folder / name).read_text(encoding="utf-8"))
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to
        write(folder / name, content)

    return apply


def text(name: str, content: str) -> Break:
    def apply(folder: Path) -> None:
        (folder / name).write_text(content, encoding="utf-8")

    return apply


def swap(folder: Path) -> None:
    """An evaluation of other prompts in place of the unlearned model's."""
    for name in ("generations.jsonl", "outcomes.jsonl"):
        path = folder / "evaluation" / "unlearned" / name
        path.write_text(path.read_text(encoding="utf-8").replace("-reply-1", "-reply-99"), encoding="utf-8")


def other_judge(folder: Path) -> None:
    path = folder / "evaluation" / "base" / "outcomes.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("refusal_rules", "people"), encoding="utf-8")


def no_number(folder: Path) -> None:
    path = folder / "evaluation" / "base" / "outcomes.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"p_harmful": 0.9', '"p_harmful": NaN'), encoding="utf-8")


BROKEN: dict[str, tuple[Break, str]] = {
    "unfinished": (change("manifest.json", "status", to="running"), "is not finished"),
    "list for a manifest": (text("manifest.json", "[]"), "manifest.json"),
    "other version": (change("manifest.json", "schema_version", to=9), "9"),
    "no environment": (change("manifest.json", "environment", to=None), "environment"),
    "no commit": (change("manifest.json", "environment", to={}), "manifest.json"),
    "cut results": (text("results.json", '{"a"'), "results.json can't be read"),
    "results of another run": (change("results.json", "manifest", "recipe_sha256", to="0"), "another recipe"),
    "table of numbers": (change("results.json", "table", to=[1]), "table"),
    "no replies": (change("results.json", "replies", to=None), "replies"),
    "words for a count": (change("results.json", "base", "replies", to={"forget_test": {"harmful": {}}}), "base"),
    "attacks of nothing": (change("results.json", "attacks", to={}), "attacks has schema version None"),
    "log of words": (text("training_log.jsonl", '{"loss": "x", "step": 1}\n'), "training_log.jsonl line 1"),
    "cut replies": (text("evaluation/base/generations.jsonl", '{"schema_version": 6'), "breaks off"),
    "no outcomes": (
        lambda folder: (folder / "evaluation/base/outcomes.jsonl").unlink(),
        "outcomes.jsonl: it was removed",
    ),
    "other prompts": (swap, "replies to different prompts"),
    "other judge": (other_judge, "judged by people"),
    "no number": (no_number, "results.json"),
    "vector of words": (change("manifest.json", "negation", "task_vector_norm", to="x"), "manifest.json"),
    "sweep under way": (change("sweep/sweep.json", "pick", to=None), "not finished"),
    "sweep of nothing": (change("sweep/sweep.json", "points", to=[{}]), "sweep.json doesn't fit"),
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
