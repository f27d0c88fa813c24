"""``kill -9`` at random moments of ``sku run``, again and again: what is left, and how a resumed run ends."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest

from faults.commands import Command, ForkServer
from faults.conftest import FinishedRun
from faults.phases import PHASES, phase_of
from faults.runs import (
    ADAPTER,
    SWEPT,
    WHOLE,
    Finished,
    check_equal_runs,
    check_leavings,
    hashes_below,
    keeps_bad,
    words_of,
)
from faults.summary import Tally

pytestmark = pytest.mark.integration

BATTERY = "kill -9 of sku run"
KILLS = {
    "data": 1, "base evaluation": 1, "stage 1": 3, "stage 2": 2, "sweep": 1, "wipe": 1, "result evaluation": 2,
    "report": 1,
}  # fmt: skip
"""Phase -> kills aimed at it; a run is gone on with after each."""
LONGEST_DELAY = 0.2
"""Seconds that a process goes on after the operation it was stopped at: the kernel then ends it anywhere."""


@pytest.mark.parametrize(
    ("seed", "settings"),
    [(1, WHOLE), (4, ADAPTER), (5, SWEPT)],
    ids=["whole", "adapter", "sweep"],
)
def test_a_run_that_is_killed_over_and_over_ends_as_if_it_had_not_been(
    seed: int, settings: dict[str, str], base: Path, server: ForkServer, finished_run: FinishedRun, tally: Tally,
    tmp_path: Path,
) -> None:  # fmt: skip
    settings = {**settings, "model.path": str(base)}
    finished, draws = finished_run(settings), random.Random(seed)
    before, run = hashes_below(base), tmp_path / "run"

    def start(**faults: Any) -> Command:
        words = ["run", "--out", run, "--resume", *words_of(settings)]
        return server.start(*words, watch=tmp_path, run=run, keeps_bad=keeps_bad(settings), **faults)

    for phase in aims(finished):
        number = draws.randint(1, max(1, finished.count(phase) // (2 if phase == "stage 1" else 1)))
        command = start(stop_at=[phase, number])
        if not command.stops():
            assert command.ended().code == 0, command.ended().err
            break
        command.send(signal.SIGKILL, after=draws.choice([0, draws.uniform(0, LONGEST_DELAY)]))
        ended = command.end()
        if ended.code == 0:  # It was quicker.
            break
        assert ended.code == -signal.SIGKILL, ended.err
        reached = phase_of(run, keeps_bad=keeps_bad(settings))
        tally(BATTERY, reached)
        if reached == "complete":  # It was printing.
            break
        check_leavings(tmp_path, run, finished.folder)
        assert hashes_below(base) == before
    else:
        ended = start().end()
        assert ended.code == 0, ended.err
    check_equal_runs(run, finished.folder)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert hashes_below(base) == before


def aims(finished: Finished) -> list[str]:
    """The phases that the kills of one chain are aimed at, in order."""
    return [phase for phase in PHASES if finished.count(phase) for _ in range(KILLS.get(phase, 0))]


@pytest.mark.parametrize("phase", ["stage 1", "stage 2"])
def test_a_kill_that_follows_sigterm_before_all_is_removed(
    phase: str, base: Path, server: ForkServer, finished_run: FinishedRun, tally: Tally, tmp_path: Path
) -> None:
    """As schedulers do. The recipe says that no bad model may wait for ``--resume``, so there is much to remove."""
    settings = {**WHOLE, "model.path": str(base), "keep_bad_model": "never"}
    finished, run = finished_run(settings), tmp_path / "run"
    words = ["run", "--out", run, "--resume", *words_of(settings)]
    for operations in (1, 3, 5):
        stop_at = [phase, finished.count(phase) // 2]
        command = server.start(*words, watch=tmp_path, run=run, stop_at=stop_at, again=operations)
        assert command.stops()
        command.send(signal.SIGTERM)
        assert command.stops()
        command.send(signal.SIGKILL)
        assert command.end().code == -signal.SIGKILL
        tally("kill -9 after SIGTERM", phase)
        check_leavings(tmp_path, run, finished.folder)
    ended = server.start(*words, watch=tmp_path, run=run).end()
    assert ended.code == 0, ended.err
    check_equal_runs(run, finished.folder)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
