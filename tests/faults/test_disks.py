"""A disk that is full or read-only at any moment of ``sku run``: one line, exit code 2, nothing left of the run."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from faults.commands import Ended, Forks
from faults.conftest import FinishedRun
from faults.phases import PHASES
from faults.runs import ADAPTER, WHOLE, check_equal_runs, check_leavings, words_of

pytestmark = pytest.mark.integration

FAULTS = ("ENOSPC", "limit 0", "EDQUOT", "limit 0", "EROFS", "limit 0", "EIO", "limit 0", "EACCES", "limit 65536")
USUAL = ("recipe ", "until the run is finished ")
"""Lines that are no error; progress besides."""
PROGRESS = (" is done", " has begun")
EVERY = 4
"""Each run is forked at one in so many of its operations: another one in each run."""


def check_one_line(ended: Ended) -> str:
    """Exit code 2 and one line that is an error; returns it."""
    assert ended.code == 2, ended.err
    assert "Traceback" not in ended.err
    assert ended.out == ""
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    others = [text for text in ended.err.splitlines() if text.strip() and text != line]
    others = [
        text for text in others if not text.startswith(USUAL) and not text.endswith(PROGRESS) and " left " not in text
    ]
    assert others == [], ended.err
    return line


@pytest.mark.parametrize(("settings", "offset"), [(WHOLE, 0), (ADAPTER, 2)], ids=["whole", "adapter"])
def test_a_disk_that_is_full_at_any_operation(
    settings: dict[str, str], offset: int, base: Path, server: Forks, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    run = place / "run"
    words = ["run", "--out", run, *words_of({**settings, "model.path": str(base), **TWO_STEPS})]
    plan = {"faults": FAULTS, "offset": offset, "every": EVERY}
    command = server.start(*words, watched=place, run=run, branch=plan)
    ended = command.end()
    assert ended.code == 0, ended.err
    for branch in command.noted("branches"):
        where = f"{branch['fault']} at {branch['event']} of {branch['path']}"
        found = Ended(branch["code"], branch["out"], branch["err"])
        if found.code == 0 and branch["fault"].startswith("limit "):
            assert "results.json" in branch["out"], where  # Nothing was written any more.
            continue
        assert found.code == 2, (where, found.err)
        check_one_line(found)
        assert branch["left"] == [], where


TWO_STEPS = {"acquire.training.max_steps": "2"}


def test_a_disk_that_fills_up_again_and_again(
    base: Path, server: Forks, finished_run: FinishedRun, tmp_path: Path
) -> None:
    """What was there before a command stays where it fails, and is gone on with when there is room."""
    settings = {**WHOLE, "model.path": str(base)}
    finished, run, draws = finished_run(settings), tmp_path / "run", random.Random(0)
    words = ["run", "--out", run, "--resume", *words_of(settings)]
    first = server.start(*words, watched=tmp_path, run=run, stop_at=("base evaluation", 1))
    assert first.stops()
    first.send(signal.SIGTERM)
    assert first.end().code == 143
    for phase in PHASES[1:-1]:
        if not finished.count(phase):
            continue
        stop_at = (phase, draws.randint(1, max(1, finished.count(phase) // 2)))
        fault = draws.choice([name for name in FAULTS if not name.startswith("limit ")])  # It would hit stderr too.
        ended = server.start(*words, watched=tmp_path, run=run, stop_at=stop_at, fault=fault).end()
        check_one_line(ended)
        check_leavings(tmp_path, run, finished.folder)
    ended = server.start(*words, watched=tmp_path, run=run).end()
    assert ended.code == 0, ended.err
    check_equal_runs(run, finished.folder)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_results_that_can_not_be_printed(base: Path, server: Forks, finished_run: FinishedRun, tmp_path: Path) -> None:
    settings = {**WHOLE, "model.path": str(base)}
    run = tmp_path / "run"
    words = ["run", "--out", run, *words_of(settings)]
    ended = server.start(*words, watched=tmp_path, run=run, stdout="/dev/full").end()
    assert "No space left on device" in check_one_line(ended)
    check_equal_runs(run, finished_run(settings).folder)


@pytest.mark.parametrize("place", ["file/run", "link/run", "/dev/full/x"])
def test_a_place_that_takes_no_folder(place: str, server: Forks, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "file")
    (tmp_path / "nowhere").symlink_to(tmp_path / "file")
    before = sorted(tmp_path.iterdir())
    run = tmp_path / place
    ended = server.start("run", "--out", run, *words_of(WHOLE), watched=tmp_path, run=tmp_path / "run").end()
    assert str(run) in check_one_line(ended)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "file").read_text(encoding="utf-8") == "kept"
