"""Ctrl-C and a scheduler's SIGTERM at any phase of ``sku run``: one line, an exit code, nothing half-written."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from faults.commands import PACKAGE, Ended, ForkServer
from faults.conftest import FinishedRun
from faults.phases import PHASES, phase_of
from faults.runs import ADAPTER, SWEPT, WHOLE, check_equal_runs, check_leavings, hashes_below, keeps_bad, words_of
from faults.summary import Tally

pytestmark = pytest.mark.integration

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
NAMES = {signal.SIGINT: "SIGINT", signal.SIGTERM: "SIGTERM"}


def check_answer(ended: Ended, sent: signal.Signals, line: str) -> None:
    """One line, that exit code, and no traceback."""
    assert ended.code == CODES[sent], ended.err
    assert "Traceback" not in ended.err
    assert ended.out == ""
    (said,) = [text for text in ended.err.splitlines() if text.startswith("interrupted")]
    assert said == line


@pytest.mark.parametrize(
    ("seed", "settings"), [(1, WHOLE), (2, ADAPTER), (3, SWEPT)], ids=["whole", "adapter", "sweep"]
)
def test_an_interrupted_run_says_how_to_go_on_and_does(
    seed: int, settings: dict[str, str], base: Path, server: ForkServer, finished_run: FinishedRun, tally: Tally,
    tmp_path: Path,
) -> None:  # fmt: skip
    settings = {**settings, "model.path": str(base)}
    finished, draws = finished_run(settings), random.Random(seed)
    before, run = hashes_below(base), tmp_path / "run"
    words = ["run", "--out", run, "--resume", *words_of(settings)]
    keeps = keeps_bad(settings)
    for count, phase in enumerate(phase for phase in PHASES[:-1] if finished.count(phase)):
        number = draws.randint(1, max(1, finished.count(phase) // 2))
        command = server.start(*words, watch=tmp_path, run=run, keeps_bad=keeps, stop_at=[phase, number])
        assert command.stops(), command.ended().err
        reached = phase_of(run, keeps_bad=keeps)
        sent = (signal.SIGINT, signal.SIGTERM)[(count + seed) % 2]
        command.send(sent, after=draws.choice([0, draws.uniform(0, 0.1)]))
        ended = command.end()
        if ended.code == 0:  # It was quicker.
            break
        tally(f"{NAMES[sent]} to sku run", reached)
        check_answer(ended, sent, f"interrupted; go on with the same command and --out {run} --resume")
        check_leavings(tmp_path, run, finished.folder)
        assert [path for path in tmp_path.rglob(".*") if not path.name.endswith(".partial")] == []
        assert hashes_below(base) == before
    else:
        ended = server.start(*words, watch=tmp_path, run=run).end()
        assert ended.code == 0, ended.err
    check_equal_runs(run, finished.folder)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("sent", CODES)
def test_an_interrupt_while_libraries_are_imported(sent: signal.Signals, tally: Tally, tmp_path: Path) -> None:
    """Before there is anything to go on with."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sku", "run", "--out", str(tmp_path / "run")],
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
    tally(f"{NAMES[sent]} to sku run", "imports")
    check_answer(Ended(process.returncode, out, err), sent, "interrupted")
    assert list(tmp_path.iterdir()) == []
