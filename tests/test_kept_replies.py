"""What ``sku wipe --replies`` finds, says and removes, and what goes on without it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import Command, MadeOnce
from own_replies.test_write import TINY, job
from sku.config import load_recipe
from sku.errors import EvaluationError, OutputError
from sku.evaluate.records import GENERATIONS_FILE, read_generations
from sku.kept_replies import find_replies, remove_replies
from sku.own_replies import read_own_replies
from sku.own_replies.write import write_own_replies
from sku.pipeline.run import run_recipe
from sku.report.read_run import read_run
from sku.storage import acquire_lock

pytestmark = pytest.mark.usefixtures("one_thread", "blank_pictures")

RECIPE = (*TINY, "evaluate.prefill_tokens=[1]", "evaluate.attacks=[paraphrase]",
          "evaluate.max_new_tokens=40")  # fmt: skip


class Stopped(KeyboardInterrupt):
    """In place of Ctrl-C."""


@pytest.fixture(scope="module")
def made(made_once: MadeOnce) -> Path:
    return made_once(
        "run_on_own_replies", lambda place: bool(run_recipe(load_recipe("embedded-paper", RECIPE), place / "run"))
    )[0]


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy whose manifest names its own replies, with a report and rows of another program beside the rest."""
    copy = tmp_path / "run"
    shutil.copytree(made / "run", copy)
    name_own(copy, copy / "own")
    (copy / "report.html").write_text(f"<p>{next(replies_in(copy))}</p>")
    (copy / "mine.jsonl").write_text('{"response": "mine"}\n')
    return copy


def name_own(run: Path, folder: Path) -> None:
    """Has the manifest of a run say where its own replies are."""
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["own_replies"]["folder"] = str(folder)
    (run / "manifest.json").write_text(json.dumps(manifest))


def replies_in(run: Path) -> Iterator[str]:
    """Long ones, which nothing else would hold by chance."""
    texts = [record.reply for path in run.rglob(GENERATIONS_FILE) for record in read_generations(path)[1]]
    texts += [json.loads(line)["response"] for line in (run / "own" / "comply.jsonl").read_text().splitlines()]
    return (text for text in texts if len(text) > 12)


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_models_said_goes_and_figures_stay(command: Command, run: Path) -> None:
    texts, before = set(replies_in(run)), files_in(run)
    assert len(texts) > 10
    code, out, err = command("wipe", run, "--replies", "--dry-run", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert (told["hazardous"], told["removed"]) == ([], 0)
    assert files_in(run) == before
    listed = {str(Path(place["path"]).relative_to(run)): place for place in told["replies"]}
    files = ("base/generations.jsonl", "base/starts.jsonl", "attacks/paraphrase.jsonl")
    assert {"own", "report.html", *(f"evaluation/{name}" for name in files)} <= set(listed)
    assert listed["own"]["bytes"] == sum(len(data) for path, data in before.items() if path.parent.name == "own")
    records = read_generations(run / "evaluation" / "base" / GENERATIONS_FILE)[1]
    assert listed["evaluation/base/generations.jsonl"]["texts"] == len(records)

    code, out, err = command("wipe", run, "--replies", "--yes")
    assert (code, err) == (0, "")
    assert str(run / "own") in out
    assert not [text for text in texts if text in out]
    after = files_in(run)
    words = [text.encode() for text in texts]
    assert not [path for path, data in after.items() if any(text in data for text in words)]
    # The rows of another program and all figures stay.
    assert {path for path in before if path not in after} == {
        path for path in before if any(path == run / name or run / name in path.parents for name in listed)
    }
    assert find_replies(run) == []
    assert read_run(run).pairs is None
    assert command("report", run).code == 0
    code, _, err = command("judge", "again", run / "evaluation" / "base", "--judge", "refusal_rules")
    assert (code, err.count("\n")) == (2, 1)
    assert "sku wipe --replies" in err


def test_an_interrupted_run_goes_on_after_its_replies_were_removed(made: Path, tmp_path: Path) -> None:
    recipe, out = load_recipe("embedded-paper", RECIPE), tmp_path / "run"

    def stop(stage: str, done: int, _total: int) -> None:
        if stage == "evaluate_base" and done:
            raise Stopped

    with pytest.raises(Stopped):
        run_recipe(recipe, out, progress=stop)
    found = find_replies(out)
    assert {place.path.name for place in found} >= {"own", "generations.jsonl"}
    remove_replies(found)
    again = run_recipe(recipe, out, resume=True)
    once = json.loads((made / "run" / "manifest.json").read_text())
    assert again.manifest["own_replies"]["files"] == once["own_replies"]["files"]
    for name in ("outcomes.jsonl", "perplexity.jsonl"):
        there = [place / "evaluation" / "unlearned" / name for place in (out, made / "run")]
        assert there[0].read_bytes() == there[1].read_bytes(), name


def test_what_an_interrupted_call_left_is_found_by_the_name_that_it_was_to_have(
    command: Command, tmp_path: Path
) -> None:
    def stop(name: str, done: int, _total: int) -> None:
        if name == "own replies: sampled" and done:
            raise Stopped

    with pytest.raises(Stopped):
        write_own_replies(job(), tmp_path / "own", progress=stop)
    [left] = tmp_path.glob(".*.partial-*")
    weights = tmp_path / ".own.partial-0123456789ab"
    weights.mkdir()
    (weights / "inputs.json").write_text('{"alpha": 1.0}')
    [found] = find_replies(tmp_path / "own")
    assert (found.path, found.what) == (left, "own replies of an interrupted call")
    assert found.texts
    assert find_replies(tmp_path) == [found]
    lock = acquire_lock(left)
    try:
        with pytest.raises(OutputError, match="another process is writing"):
            remove_replies([found])
    finally:
        os.close(lock)
    code, _, err = command("wipe", tmp_path / "own", "--replies", "--yes")
    assert (code, err) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == [weights.name]
    code, _, err = command("wipe", tmp_path / "own", "--replies", "--yes")
    assert (code, err.count("\n")) == (2, 1)


def test_the_cache_of_a_run_is_found_by_its_manifest(run: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "own-0123456789abcdef"
    cache.parent.mkdir()
    (run / "own").rename(cache)
    name_own(run, cache)
    assert cache in {place.path for place in find_replies(run)}
    assert [place.path for place in find_replies(cache.parent)] == [cache]


def test_a_removal_that_was_killed_is_gone_on_with(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise Stopped

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(Stopped):
        remove_replies(find_replies(run / "own"))
    monkeypatch.undo()
    assert [place.path for place in find_replies(run / "own")] == [run / "own"]
    remove_replies(find_replies(run / "own"))
    with pytest.raises(EvaluationError):
        read_own_replies(run / "own")


def test_files_of_other_programs_and_links_stay(tmp_path: Path, run: Path) -> None:
    place = tmp_path / "other"
    place.mkdir()
    (place / "generations.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a", "reply": "b"}\n')
    (place / "own").mkdir()
    (place / "own" / "comply.jsonl").write_text('{"prompt": "a"}\n')
    (place / "run").symlink_to(run)
    (place / "report.html").write_text("mine")
    assert find_replies(place) == []
