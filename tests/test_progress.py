"""What a user hears: bars on a terminal, plain lines elsewhere by a clock that the test moves, each message once."""

from __future__ import annotations

import errno
import io
import logging
import os
import pty
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import Progress

from conftest import ModelMaker
from sku.cli import console as printing
from sku.progress import FIRST, PERIOD, Lines, quiet_libraries, shown_progress


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


def test_after_10_seconds_comes_a_line_and_then_one_every_30_with_the_pace_of_its_stage() -> None:
    watched = Watched()
    assert watched.after(2, "acquire: steps", 1, 220) == []
    told = [line for step in range(2, 33) for line in watched.after(5, "acquire: steps", step, 220)]
    assert told[0] == "acquire: steps 2 of 220, 5.0 s each, 18 min 10 s left"
    assert len(told) == 1 + 145 // PERIOD
    watched.after(1, "acquire: steps", 1, 300)
    told = [line for step in range(2, 32) for line in watched.after(2, "acquire: steps", step, 300)]
    assert " of 300, 2.0 s each, " in told[-1], "the pace of the next job is its own"


def test_what_takes_long_counts_nothing_or_is_done_is_told_again_by_the_clock() -> None:
    watched = Watched()
    assert watched.after(20, "acquire: steps", 3, 220) == ["at work for 10 s", "acquire: steps 3 of 220"]
    assert [line[-11:] for line in watched.after(95)] == ["30 s so far", "00 s so far", "30 s so far"]
    watched = Watched()
    watched.after(FIRST)
    for seconds, news, word in (
        (FIRST, ("load", 0, 1), "begun"), (PERIOD, (), "30 s"), (PERIOD, ("load", 1, 1), ""), (PERIOD, (), "done"),
    ):  # fmt: skip
        (line,) = watched.after(seconds, *news)
        assert line.startswith("load")
        assert word in line


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
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    assert written(os.pipe) == "judge: steps 1 of 4\n"
    assert written(os.pipe, quiet=True) == ""
    for terminal, bar in (("xterm", True), ("dumb", False)):
        monkeypatch.setenv("TERM", terminal)
        assert ("━" in written(pty.openpty)) is bar


class FullDisk(io.StringIO):
    """As a log on one."""

    tried = False

    def write(self, _text: str) -> int:
        self.tried = True
        raise OSError(errno.ENOSPC, "No space left on device")


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


def test_an_adapter_of_a_model_without_a_configuration_is_saved_without_a_word(
    make_model: ModelMaker, tmp_path: Path
) -> None:
    """A folder with a GGUF file has no config.json, and PEFT warns of it twice for each checkpoint."""
    model = make_model()
    model.name_or_path = str(tmp_path)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        quiet_libraries()
        get_peft_model(model, LoraConfig(target_modules="all-linear")).save_pretrained(str(tmp_path / "adapter"))
    assert not [warning for warning in heard if "config file" in str(warning.message)]


def test_a_message_is_shown_once_also_where_a_library_gave_the_root_logger_a_handler(
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, handler = logging.getLogger(), logging.StreamHandler(sys.stderr)
    root.addHandler(handler)
    try:
        with printing.shown_messages():
            logging.getLogger("sku.evaluate.judges").warning("a reply was cut")
        logging.getLogger("sku.evaluate.judges").warning("afterwards")
    finally:
        root.removeHandler(handler)
    printed = capsys.readouterr().err
    assert printed.count("a reply was cut") == printed.count("afterwards") == 1
