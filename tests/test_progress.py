"""Bars on a terminal, plain lines elsewhere: when a line comes and what it says, by a clock that the test moves."""

from __future__ import annotations

import errno
import io
import os
import pty
from collections.abc import Callable

import pytest
from rich.console import Console
from rich.progress import Progress

from sku.cli import console as printing
from sku.progress import FIRST, PERIOD, Lines, shown_progress


class Clock:
    """Stands still by itself."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """Lines as a log file gets them."""

    def __init__(self) -> None:
        self.clock, self.log = Clock(), io.StringIO()
        bars = Progress(disable=True, get_time=self.clock, speed_estimate_period=1800)
        self.lines = Lines(bars, Console(file=self.log, width=40), self.clock)

    def after(self, seconds: float, *news: str | int) -> list[str]:
        """What is printed when that much time passes, with news at its end or without."""
        before, until = len(self.log.getvalue()), self.clock.now + seconds

        def wait(seconds: float) -> bool:
            if self.clock.now + seconds > until:
                return True
            self.clock.now += seconds
            return False

        self.lines.repeat(wait)
        self.clock.now = until
        if news:
            self.lines.show(*news)  # type: ignore[arg-type]
        return self.log.getvalue()[before:].splitlines()


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_after_10_seconds_comes_a_line_and_then_one_every_30(watched: Watched) -> None:
    assert watched.after(2, "acquire: steps", 1, 220) == []
    told = [line for step in range(2, 33) for line in watched.after(5, "acquire: steps", step, 220)]
    assert told[0] == "acquire: steps 2 of 220, 5.0 s each, 18 min 10 s left"
    assert len(told) == 1 + 145 // PERIOD
    assert all(len(line) > 40 for line in told), "no line is broken at the width of a terminal that isn't there"


def test_a_step_that_takes_long_is_told_again_by_the_clock(watched: Watched) -> None:
    assert watched.after(20, "acquire: steps", 3, 220) == ["at work for 10 s", "acquire: steps 3 of 220"]
    assert watched.after(95) == [
        "acquire: steps still at 3 of 220, 30 s so far",
        "acquire: steps still at 3 of 220, 1 min 00 s so far",
        "acquire: steps still at 3 of 220, 1 min 30 s so far",
    ]
    assert watched.after(5, "acquire: steps", 4, 220) == []
    assert watched.after(25) == ["acquire: steps 4 of 220, 100.0 s each, 6 h 00 min left"]


def test_what_counts_nothing_and_what_is_done_is_told_too(watched: Watched) -> None:
    assert watched.after(FIRST) == ["at work for 10 s"]
    assert watched.after(FIRST, "load", 0, 1) == ["load has begun"]
    assert watched.after(PERIOD) == ["load, 30 s so far"]
    assert watched.after(1, "load", 1, 1) == []
    assert watched.after(PERIOD) == ["load is done"]
    assert watched.after(PERIOD) == ["load done 59 s ago, at work on what follows"]


def test_the_same_stage_begins_anew_with_a_pace_of_its_own(watched: Watched) -> None:
    for step in range(1, 4):
        watched.after(100, "acquire: steps", step, 3)
    watched.after(1, "acquire: steps", 1, 300)
    told = [line for step in range(2, 32) for line in watched.after(2, "acquire: steps", step, 300)]
    assert told[-1] == "acquire: steps 25 of 300, 2.0 s each, 9 min 10 s left"


def shown(show: Callable[[str, int, int], None], clock: Clock) -> None:
    clock.now += FIRST
    show("judge: steps", 1, 4)


def written(file_of: Callable[[], tuple[int, int]], *, quiet: bool = False) -> str:
    """What ends up where standard error is a pipe or a terminal."""
    reader, writer = file_of()
    with os.fdopen(writer, "w") as file:
        clock = Clock()
        with shown_progress(Console(file=file, quiet=quiet), clock) as show:
            shown(show, clock)
        # A terminal forgets what nobody read once it is closed.
        file.write("end")
        file.flush()
        found = b""
        while not found.endswith(b"end"):
            found += os.read(reader, 4096)
    os.close(reader)
    return found.decode().removesuffix("end")


def test_a_pipe_gets_lines_a_terminal_a_bar_and_quiet_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    assert written(os.pipe) == "judge: steps 1 of 4\n"
    assert written(os.pipe, quiet=True) == ""
    assert "━" in written(pty.openpty)
    monkeypatch.setenv("TERM", "dumb")
    assert written(pty.openpty) == "judge: steps 1 of 4\r\n"


def test_a_log_that_nobody_reads_or_that_is_full_ends_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    clock = Clock()
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr("sys.stderr", closed)
        notes = type(printing.notes)(stderr=True)
        with shown_progress(notes, clock) as show:
            shown(show, clock)
            assert notes.quiet
            shown(show, clock)
    full = FullDisk()
    with shown_progress(Console(file=full), clock) as show:
        shown(show, clock)
    assert full.tried


class FullDisk(io.StringIO):
    """As a log on one."""

    tried = False

    def write(self, _text: str) -> int:
        self.tried = True
        raise OSError(errno.ENOSPC, "No space left on device")
