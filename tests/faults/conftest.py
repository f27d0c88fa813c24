"""What the batteries of kills, signals and full disks share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.commands import Forks
from faults.runs import Finished, keeps_bad, words_of
from sku.model_files import embedded_model_path

FinishedRun = Callable[[dict[str, str]], Finished]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Forks:
    """Starts commands without paying for imports."""
    return Forks(tmp_path_factory.mktemp("output"))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as a user's own: nothing may change it."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(embedded_model_path(), folder)
    return folder


@pytest.fixture(scope="session")
def finished_run(server: Forks, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """An undisturbed run with the given settings."""
    runs: dict[tuple[str, ...], Finished] = {}

    def run(settings: dict[str, str]) -> Finished:
        words = words_of(settings)
        if tuple(words) not in runs:
            place = tmp_path_factory.mktemp("finished")
            folder = place / "run"
            command = server.start(
                "run", "--out", folder, *words, watched=place, run=folder, keeps_bad=keeps_bad(settings)
            )
            ended = command.end()
            assert ended.code == 0, ended.err
            runs[tuple(words)] = Finished(folder, command.noted("operations"))
        return runs[tuple(words)]

    return run
