"""Batteries of faults: how many cases there were, and how many of them the package survived."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faults.commands import ForkServer
from faults.runs import Finished, keeps_bad, words_of
from sku.model_files import embedded_model_path

CASES = "faults"
Tally = Callable[[str, str], None]
"""Notes a case: its battery, and its kind."""
FinishedRun = Callable[[dict[str, str]], Finished]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Starts commands without paying for imports."""
    started = ForkServer(tmp_path_factory.mktemp("output"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as a user's own: nothing may change it."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(embedded_model_path(), folder)
    return folder


@pytest.fixture(scope="session")
def finished_run(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """An undisturbed run with the given settings."""
    runs: dict[tuple[str, ...], Finished] = {}

    def run(settings: dict[str, str]) -> Finished:
        words = words_of(settings)
        if tuple(words) not in runs:
            place = tmp_path_factory.mktemp("finished")
            folder = place / "run"
            command = server.start(
                "run", "--out", folder, *words, watch=place, run=folder, keeps_bad=keeps_bad(settings)
            )
            ended = command.end()
            assert ended.code == 0, ended.err
            runs[tuple(words)] = Finished(folder, command.operations())
        return runs[tuple(words)]

    return run


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Notes cases; they have survived if the test passes. The notes travel with the report, under xdist too."""

    def note(battery: str, kind: str) -> None:
        request.node.user_properties.append((CASES, (battery, kind)))

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line a battery."""
    cases: dict[str, Counter[str]] = {}
    survived: Counter[str] = Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, value in report.user_properties if report.when == "call" else ():
                if name == CASES:
                    battery, kind = value
                    cases.setdefault(battery, Counter())[kind] += 1
                    survived[battery] += outcome == "passed"
    if cases:
        terminalreporter.section("faults")
    for battery, kinds in cases.items():
        parts = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
        terminalreporter.line(f"{battery}: {kinds.total()} cases, {survived[battery]} survived ({parts})")
