"""How far long work has come: bars on a terminal, plain lines where there is none (``nohup``, a pipe, a scheduler).

Both read the same tasks of ``rich.progress``, which keep the pace and tell the time left. The first line comes after
``FIRST`` seconds, so that short work says nothing, then one every ``PERIOD`` seconds, from a thread where a step takes
longer.
"""

from __future__ import annotations

import threading
import time
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
        if drawn or console.quiet:
            yield _Stages(bars).show
            return
        lines = Lines(bars, console, clock)
        done = threading.Event()
        # A daemon, so that a reader that stalls the pipe can't keep the process from ending.
        repeating = threading.Thread(target=lines.repeat, args=(done.wait,), name="progress", daemon=True)
        repeating.start()
        try:
            yield lines.show
        finally:
            done.set()
            repeating.join(timeout=1)


class _Stages:
    """The tasks of ``rich.progress`` by the name of their stage."""

    def __init__(self, bars: Progress) -> None:
        self._bars, self._ids = bars, dict[str, TaskID]()
        self.last: Task | None = None
        """The one that was heard of last."""

    def show(self, stage: str, done: int, total: int) -> None:
        bars = self._bars
        if stage not in self._ids:
            self._ids[stage] = bars.add_task(stage.replace("_", " "), total=total)
        elif done < bars.tasks[self._ids[stage]].completed:
            bars.reset(self._ids[stage], total=total)  # The same stage of the next job: its time starts anew.
        bars.update(self._ids[stage], completed=done, total=total)
        self.last = bars.tasks[self._ids[stage]]


class Lines:
    """Plain lines about the stage that was heard of last."""

    def __init__(self, bars: Progress, console: Console, clock: Callable[[], float]) -> None:
        """Nothing is printed yet.

        Args:
            bars: Keep the pace; disabled.
            console: As in ``shown_progress``.
            clock: Seconds, that of ``bars``.
        """
        self._stages, self._console, self._clock = _Stages(bars), console, clock
        self._lock = threading.Lock()
        self._begun = self._printed_at = self._moved_at = clock()
        self._has_printed = False
        self._printed: Task | None = None
        """Stage of the last line."""
        self._moved = False
        """Whether anything was heard since the last line."""

    def show(self, stage: str, done: int, total: int) -> None:
        """Called by the work."""
        with self._lock:
            self._stages.show(stage, done, total)
            self._moved, self._moved_at = True, self._clock()
            if self._left() <= 0:
                self._print()

    def repeat(self, wait: Callable[[float], bool]) -> None:
        """Prints whenever a line is due, until ``wait``, which is called with seconds, says that the work is done."""
        while not wait(max(self._left(), 0.1)):
            with self._lock:
                if self._left() <= 0:
                    self._print()

    def _left(self) -> float:
        """Seconds until the next line."""
        period = PERIOD if self._has_printed and self._printed is self._stages.last else FIRST
        return self._printed_at + period - self._clock()

    def _print(self) -> None:
        task, now = self._stages.last, self._clock()
        if task is None:
            text = f"at work for {duration(now - self._begun)}"
        else:
            text = told(task) if self._moved else told_again(task, now - self._moved_at)
        self._has_printed, self._printed, self._printed_at, self._moved = True, task, now, False
        with suppress(OSError):  # A full disk under a log must not end hours of work.
            self._console.print(text, soft_wrap=True, markup=False, highlight=False)


def told(task: Task) -> str:
    """A task that has moved: ``acquire: steps 40 of 220, 5.2 s each, 15 min 36 s left``.

    Args:
        task: Of ``rich.progress``, with a total; one that is 1 counts nothing.
    """
    if task.total == 1:
        return f"{task.description} {'is done' if task.finished else 'has begun'}"
    parts = [f"{task.description} {_counted(task)}"]
    speed, left = task.speed, task.time_remaining
    if speed and left is not None and not task.finished:
        parts += [f"{1 / speed:.1f} s each" if speed < 1 else f"{speed:,.1f} a second", f"{duration(left)} left"]
    return ", ".join(parts)


def told_again(task: Task, seconds: float) -> str:
    """A task that was told before: ``acquire: steps still at 3 of 220, 45 s so far``.

    Args:
        task: As in ``told``.
        seconds: Since it moved.
    """
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
