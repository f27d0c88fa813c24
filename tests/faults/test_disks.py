"""A disk that is full or read-only at any moment of ``sku run``: one line, exit code 2, and nothing left of the run."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.commands import Ended, ForkServer
from faults.conftest import FinishedRun, Tally
from faults.phases import PHASES, phase_of
from faults.runs import ADAPTER, WHOLE, check_equal_runs, check_leavings, words_of

FAULTS = ("ENOSPC", "limit 0", "EDQUOT", "limit 0", "EROFS", "limit 0", "EIO", "limit 0", "EACCES", "limit 65536")
EVERY = 4
"""Each run is forked at one in so many of its operations: another one in each run."""


def check_one_line(ended: Ended) -> str:
    """Exit code 2 and one line that is an error; returns it."""
    assert ended.code == 2, ended.err
    assert "Traceback" not in ended.err
    assert ended.out == ""
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    others = [text for text in ended.err.splitlines() if text.strip() and text != line]
    assert [text for text in others if not text.startswith("recipe ") and " left " not in text] == [], ended.err
    return line


@pytest.mark.parametrize(("settings", "offset"), [(WHOLE, 0), (WHOLE, 2), (ADAPTER, 1)], ids=["0", "2", "adapter"])
def test_a_disk_that_is_full_at_any_operation(
    settings: dict[str, str], offset: int, base: Path, server: ForkServer, tally: Tally, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    run = place / "run"
    words = ["run", "--out", run, *words_of({**settings, "model.path": str(base), **ONE_CHECKPOINT})]
    plan = {"faults": FAULTS, "offset": offset, "every": EVERY}
    command = server.start(*words, watch=place, run=run, branch=plan)
    ended = command.end()
    assert ended.code == 0, ended.err
    for branch in command.branches():
        tally("full and read-only disks", branch["fault"])
        where = f"{branch['fault']} at {branch['event']} of {branch['path']}"
        found = Ended(branch["code"], branch["out"], branch["err"])
        if found.code == 0 and branch["fault"].startswith("limit "):
            assert "results.json" in branch["out"], where  # Nothing was written any more.
            continue
        assert found.code == 2, (where, found.err)
        check_one_line(found)
        assert branch["left"] == [], where


ONE_CHECKPOINT = {"acquire.training.max_steps": "2", "acquire.training.save_total_limit": "1"}
