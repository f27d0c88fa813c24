"""What is heard while work goes on: how far it has come, and what libraries may say.

Bars on a terminal, plain lines where there is none (``nohup``, a pipe, a scheduler).
Both read the same tasks of ``rich.progress``, which keep the pace and tell the time left. The first line comes after
``FIRST`` seconds, so that short work says nothing, then one every ``PERIOD`` seconds, from a thread where a step takes
longer.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

FIRST = 10.0
"""Seconds before the first line, and between two lines where a new stage has begun."""
PERIOD = 30.0
"""Seconds between two lines, at most."""
_PACE_OVER = 1800.0
"""Seconds over which the pace is taken: a step may take minutes."""


@contextmanager
def shown_progress(
    console: Console, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[str, int, int], None]]:
    """Shows the stages of some work until the block ends; a function to call with stage, done and total.

    Args:
        console: Of standard error. A quiet one shows nothing; one that is no terminal, or a dumb one, gets lines.
        clock: Seconds.
    """
    drawn = console.is_terminal and not console.is_dumb_terminal
    with Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=_PACE_OVER,
        get_time=clock,
        disable=not drawn,
    ) as bars:
        lines = Lines(bars, console, clock)
        if drawn or console.quiet:
            yield lines.move
            return
        done = threading.Event()
        # A daemon, so that a reader that stalls the pipe can't keep the process from ending.
        repeating = threading.Thread(target=lines.repeat, args=(done.wait,), name="progress", daemon=True)
        repeating.start()
        try:
            yield lines.show
        finally:
            done.set()
            repeating.join(timeout=1)


class Lines:
    """The tasks of ``rich.progress`` by the name of their stage, and plain lines about the one that moved last."""

    def __init__(self, bars: Progress, console: Console, clock: Callable[[], float]) -> None:
        self._bars, self._console, self._clock = bars, console, clock
        self._ids: dict[str, TaskID] = {}
        self._lock = threading.Lock()
        self._begun = self._printed_at = self._moved_at = clock()
        self._last: Task | None = None
        self._printed: object = self
        """Stage of the last line; at first none that there is."""
        self._moved = False
        """Whether anything was heard since the last line."""

    def move(self, stage: str, done: int, total: int) -> None:
        """Called by the work where bars are drawn."""
        bars = self._bars
        if stage not in self._ids:
            self._ids[stage] = bars.add_task(stage.replace("_", " "), total=total)
        elif done < bars.tasks[self._ids[stage]].completed:
            bars.reset(self._ids[stage], total=total)  # The same stage of the next job: its time starts anew.
        bars.update(self._ids[stage], completed=done, total=total)
        self._last = bars.tasks[self._ids[stage]]
        self._moved, self._moved_at = True, self._clock()

    def show(self, stage: str, done: int, total: int) -> None:
        """Called by the work where lines are printed."""
        with self._lock:
            self.move(stage, done, total)
            self._print_if_due()

    def repeat(self, wait: Callable[[float], bool]) -> None:
        """Prints whenever a line is due, until ``wait``, which is called with seconds, says that the work is done."""
        while not wait(max(self._left(), 0.1)):
            with self._lock:
                self._print_if_due()

    def _left(self) -> float:
        """Seconds until the next line."""
        return self._printed_at + (PERIOD if self._printed is self._last else FIRST) - self._clock()

    def _print_if_due(self) -> None:
        if self._left() > 0:
            return
        task, now = self._last, self._clock()
        if task is None:
            text = f"at work for {duration(now - self._begun)}"
        else:
            text = told(task) if self._moved else told_again(task, now - self._moved_at)
        self._printed, self._printed_at, self._moved = task, now, False
        with suppress(OSError):  # A full disk under a log must not end hours of work.
            self._console.print(text, soft_wrap=True, markup=False, highlight=False)


def told(task: Task) -> str:
    """A task that has moved: ``acquire: steps 40 of 220, 5.2 s each, 15 min 36 s left``; of 1 nothing is counted."""
    if task.total == 1:
        return f"{task.description} {'is done' if task.finished else 'has begun'}"
    text = f"{task.description} {_counted(task)}"
    speed, left = task.speed, task.time_remaining
    if not speed or left is None or task.finished:
        return text
    pace = f"{1 / speed:.1f} s each" if speed < 1 else f"{speed:,.1f} a second"
    return f"{text}, {pace}, {duration(left)} left"


def told_again(task: Task, seconds: float) -> str:
    """A task that was told before and moved seconds ago: ``acquire: steps still at 3 of 220, 45 s so far``."""
    if task.finished:
        return f"{task.description} done {duration(seconds)} ago, at work on what follows"
    still = "" if task.total == 1 else f" still at {_counted(task)}"
    return f"{task.description}{still}, {duration(seconds)} so far"


def _counted(task: Task) -> str:
    return f"{int(task.completed):,} of {int(task.total or 0):,}"


def duration(seconds: float) -> str:
    """In words: ``40 s``, ``15 min 36 s``, ``2 h 05 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")
_SHORTEST_SECRET = 8
"""A shorter value would strike out parts of ordinary words."""


def quiet_imports() -> None:
    """Silences what libraries say while they are imported, without importing one."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # Read when tqdm is imported, so before the libraries below.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # It warns of a missing CPU kernel when imported.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Silences bars and notices of libraries, whose lines would break ours.

    Warnings of Python stay, but for those of PEFT that no user can mend.
    """
    quiet_imports()
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # PEFT 0.21 reads the old name in every get_peft_model.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    # Of each adapter of a model that has no config.json, such as a GGUF file. No vocabulary is modified here.
    for message in ("Unable to fetch remote file", "Could not find a config file in"):
        warnings.filterwarnings("ignore", message, UserWarning, r"peft\.")
    for library in (transformers, datasets):
        library.utils.logging.set_verbosity(logging.ERROR)
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # What can't be read is told in a line of ours.


def without_secrets(text: str) -> str:
    """A text with ``***`` for what the environment holds as a token, key, secret or password, and for hub tokens."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and name.upper().endswith(("TOKEN", "KEY", "SECRET", "PASSWORD")):
            text = text.replace(value, "***")
    return _HUB_TOKEN.sub("***", text)
