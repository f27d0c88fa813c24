"""The page of a run in progress, from folders as a run leaves them on its way."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

import pytest

from sku.errors import EvaluationError
from sku.report.live import LIVE_FILE, read_live, write_live
from sku.storage import STEPS_FILE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "<b>run</b>"
    (run / "bad" / "bad_twin").mkdir(parents=True)
    manifest = {
        "status": "running", "seconds": {"load": 75.4, "evaluate_base": 3700},
        "recipe": {"name": "r", "method": "sku", "seed": 3},
        "stage_1": {"line": "the bad twin is harmful <i>more</i>"},
    }  # fmt: skip
    (run / "manifest.json").write_text(json.dumps(manifest))
    rows: list[dict[str, Any]] = [
        {"step": step, "of": 100, "time": 1000.0 + 2 * step, "loss": 1.5, "loss/guided_distortion": 2.0 - step / 10}
        for step in (10, 20, 20)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "bad" / "bad_twin" / STEPS_FILE).write_text(lines + '{"step": 30, "of"')
    for name, count in (("base", 12), ("unlearned", 3)):
        (run / "evaluation" / name).mkdir(parents=True)
        kept = "generations.jsonl" if name == "base" else ".generations.jsonl.partial"
        (run / "evaluation" / name / kept).write_text("{}\n" * (count + 1))
    return run


def test_what_the_folder_says(folder: Path) -> None:
    """20 of 100 steps at 2 s a step: 160 s left. The second term goes from 1 to 0 of a largest loss of 1.5."""
    found = read_live(folder)
    assert (found.recipe, found.finished) == ("recipe r, method sku, seed 3", False)
    assert found.stages == (("load", "1 min 15 s"), ("evaluate_base", "1 h 01 min"))
    assert found.replies == (("base", 12), ("unlearned", 3))
    (training,) = found.trainings
    assert (training.name, training.step, training.of, training.left) == ("bad_twin", 20, 100, "2 min 40 s")
    assert [line.name for line in training.lines] == ["loss", "guided_distortion"]
    assert training.lines[0].points == "64.0,0.0 128.0,0.0"
    assert training.lines[1].points == "64.0,26.7 128.0,80.0"


def test_the_page_reloads_until_the_run_is_finished(folder: Path) -> None:
    write_live(folder)
    page = (folder / LIVE_FILE).read_text()
    assert stat.S_IMODE((folder / LIVE_FILE).stat().st_mode) == 0o600
    assert 'http-equiv="refresh"' in page
    assert "<b>run" not in page
    assert "<i>more" not in page
    assert "&lt;i&gt;more" in page
    assert not re.search(r"https?://|src=", page)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "status": "complete"}))
    assert write_live(folder).finished
    assert 'http-equiv="refresh"' not in (folder / LIVE_FILE).read_text()


def test_a_folder_of_no_run(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"has no manifest\.json \(yet\)"):
        read_live(tmp_path)
