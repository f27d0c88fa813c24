"""``kill -9``, Ctrl-C, SIGTERM and a full disk at any phase of ``sku run``: what is left, how a resumed run ends."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from faults.commands import PACKAGE, Command, Ended, Forks
from faults.conftest import FinishedRun
from faults.runs import (
    ADAPTER,
    PHASES,
    SWEPT,
    WHOLE,
    check_equal_runs,
    check_leavings,
    hashes_below,
    keeps_bad,
    phase_of,
    words_of,
)

pytestmark = pytest.mark.integration

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
KILLS = {"stage 1": 3, "stage 2": 2, "result evaluation": 2}
"""Phase -> kills aimed at it where there is more than one; a run is gone on with after each."""
LONGEST_DELAY = 0.2
"""Seconds that a process goes on after the operation it was stopped at: the kernel then ends it anywhere."""


def check_answer(ended: Ended, sent: signal.Signals, line: str) -> None:
    """One line, that exit code, and no traceback."""
    assert ended.code == CODES[sent], ended.err
    if sent != signal.SIGKILL:
        assert "Traceback" not in ended.err
        assert ended.out == ""
        assert [text for text in ended.err.splitlines() if text.startswith("interrupted")] == [line]


@pytest.mark.parametrize("signals", [(signal.SIGKILL,), (signal.SIGINT, signal.SIGTERM)], ids=["kill", "interrupt"])
@pytest.mark.parametrize("settings", [WHOLE, ADAPTER, SWEPT], ids=["whole", "adapter", "sweep"])
def test_a_run_that_is_stopped_over_and_over_ends_as_if_it_had_not_been(
    settings: dict[str, str], signals: tuple[signal.Signals, ...], base: Path, server: Forks,
    finished_run: FinishedRun, tmp_path: Path,
) -> None:  # fmt: skip
    settings, kills = {**settings, "model.path": str(base)}, signals == (signal.SIGKILL,)
    finished, draws = finished_run(settings), random.Random(len(settings))
    before, run = hashes_below(base), tmp_path / "run"

    def start(**faults: Any) -> Command:
        words = ["run", "--out", run, "--resume", *words_of(settings)]
        return server.start(*words, watched=tmp_path, run=run, keeps_bad=keeps_bad(settings), **faults)

    aims = [name for name in PHASES[:-1] if finished.count(name) for _ in range(KILLS.get(name, 1) if kills else 1)]
    for count, phase in enumerate(aims):
        sent = signals[count % len(signals)]
        command = start(stop_at=(phase, draws.randint(1, max(1, finished.count(phase) // 2))))
        if not command.stops():
            assert command.ended().code == 0, command.ended().err
            break
        command.send(sent, after=draws.choice([0, draws.uniform(0, LONGEST_DELAY)]))
        ended = command.end()
        if ended.code == 0:  # It was quicker.
            break
        check_answer(ended, sent, f"interrupted; go on with the same command and --out {run} --resume")
        if phase_of(run, keeps_bad=keeps_bad(settings)) == "complete":  # It was printing.
            break
        check_leavings(tmp_path, run, finished.folder)
        if not kills:
            assert [path for path in tmp_path.rglob(".*") if not path.name.endswith(".partial")] == []
        assert hashes_below(base) == before
    else:
        ended = start().end()
        assert ended.code == 0, ended.err
    check_equal_runs(run, finished.folder)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert hashes_below(base) == before


@pytest.mark.parametrize("phase", ["stage 1", "stage 2"])
def test_a_kill_that_follows_sigterm_before_all_is_removed(
    phase: str, base: Path, server: Forks, finished_run: FinishedRun, tmp_path: Path
) -> None:
    """As schedulers do. The recipe says that no bad model may wait for ``--resume``, so there is much to remove."""
    settings = {**WHOLE, "model.path": str(base), "keep_bad_model": "never"}
    finished, run = finished_run(settings), tmp_path / "run"
    words = ["run", "--out", run, "--resume", *words_of(settings)]
    for operations in (1, 3, 5):
        stop_at = (phase, finished.count(phase) // 2)
        command = server.start(*words, watched=tmp_path, run=run, stop_at=stop_at, again=operations)
        for sent in (signal.SIGTERM, signal.SIGKILL):
            assert command.stops()
            command.send(sent)
        assert command.end().code == -signal.SIGKILL
        check_leavings(tmp_path, run, finished.folder)
    ended = server.start(*words, watched=tmp_path, run=run).end()
    assert ended.code == 0, ended.err
    check_equal_runs(run, finished.folder)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_libraries_are_imported(sent: signal.Signals, tmp_path: Path) -> None:
    """Before there is anything to go on with."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sku", "run", "embedded-paper", "--out", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"},
    )
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8"):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    check_answer(Ended(process.returncode, out, err), sent, "interrupted")
    assert list(tmp_path.iterdir()) == []


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
    words = ["run", "--out", run, *words_of({**settings, "model.path": str(base), "acquire.training.max_steps": "2"})]
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


def test_results_that_can_not_be_printed(base: Path, server: Forks, finished_run: FinishedRun, tmp_path: Path) -> None:
    settings = {**WHOLE, "model.path": str(base)}
    run = tmp_path / "run"
    words = ["run", "--out", run, *words_of(settings)]
    ended = server.start(*words, watched=tmp_path, run=run, stdout="/dev/full").end()
    assert "No space left on device" in check_one_line(ended)
    check_equal_runs(run, finished_run(settings).folder)
