"""``sku`` commands as forks of the test's own process, which has imported all: stopped, signalled and killed.

A fork is ``sku`` as a shell would start it: the same entry point, with files as its output. It notes its file
operations, and lets a fault happen at one of them.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.disk import Branches, Operation, watch
from faults.runs import PHASES, phase_of

PACKAGE = Path(__file__).parents[2] / "src"
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_IMPORTED = (
    "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "peft", "rouge_score.rouge_scorer",
    "transformers.models.llama.modeling_llama", "transformers.trainer", "sku.__main__", "sku.pipeline.negate",
    "sku.pipeline.run", "sku.pipeline.stages",
)  # fmt: skip
"""What a run imports, sooner or later."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """Exit code; minus the signal where one ended it."""
    out: str
    err: str


class Command:
    """A command that has been started."""

    def __init__(self, pid: int, output: Path) -> None:
        self.pid, self._output = pid, output

    def stops(self) -> bool:
        """Waits until it stops or ends; whether it stopped."""
        _, self._status = os.waitpid(self.pid, os.WUNTRACED)
        return os.WIFSTOPPED(self._status)

    def send(self, sent: signal.Signals, *, after: float = 0) -> None:
        """Sends a signal to a stopped command, which goes on first for so many seconds."""
        if after:
            os.kill(self.pid, signal.SIGCONT)
            time.sleep(after)
        os.kill(self.pid, sent)  # A process that has ended is there until somebody waits for it.
        os.kill(self.pid, signal.SIGCONT)

    def end(self) -> Ended:
        """Waits until it ends; it must not stop any more."""
        assert not self.stops(), "the command stopped a second time"
        return self.ended()

    def ended(self) -> Ended:
        """How it ended, after ``stops`` said no."""
        printed = (self._output / f"{name}.txt" for name in ("stdout", "stderr"))
        out, err = (path.read_text(encoding="utf-8") if path.exists() else "" for path in printed)
        return Ended(os.waitstatus_to_exitcode(self._status), out, err)

    def noted(self, name: str) -> list[dict[str, Any]]:
        """``operations`` that it was watched at (``phase``, ``event``, ``path``), or ``branches`` of a full disk."""
        return [json.loads(line) for line in (self._output / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


class Forks:
    """Forks commands."""

    def __init__(self, folder: Path) -> None:
        """Imports what a run does, and puts what commands print into a folder."""
        self._folder, self._count = folder, 0
        for name in _IMPORTED:
            importlib.import_module(name)

    def start(self, *argv: object, watched: Path, run: Path, stdout: str = "stdout.txt", **faults: Any) -> Command:
        """Starts ``sku ARGV``, of which file operations below ``watched`` are seen.

        ``faults`` are ``branch`` for ``Branches``, else of ``_Watcher``.
        """
        self._count += 1
        output = self._folder / str(self._count)
        output.mkdir()
        pid = os.fork()
        if pid == 0:
            try:
                _become(output, stdout, *map(str, argv))
                if "branch" in faults:
                    import sku.progress

                    # Without the thread that prints them again: a fork would copy its locks.
                    sku.progress.Lines.repeat = lambda self, wait: None  # type: ignore[method-assign]
                    watch(watched, Branches(watched, output, **faults["branch"]).see)
                else:
                    watch(watched, _Watcher(output, run, **faults).see)
                code = _code_of_sku()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            finally:  # Nothing may go back into the test.
                traceback.print_exc()
                os._exit(99)
        return Command(pid, output)


class _Watcher:
    """Notes each operation.

    With ``stop_at`` PHASE and N the process stops before its N-th operation in that phase, or before the first one of
    a later phase; with ``again`` a second time, so many operations later.
    """

    def __init__(
        self, output: Path, run: Path, *, keeps_bad: bool = False, stop_at: tuple[str, int] | None = None,
        again: int = 0,
    ) -> None:  # fmt: skip
        self._run, self._keeps_bad, self._stop_at, self._again = run, keeps_bad, stop_at, again
        self._file = os.open(output / "operations.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._counts: dict[str, int] = {}

    def see(self, operation: Operation) -> None:
        phase = phase_of(self._run, keeps_bad=self._keeps_bad)
        self._counts[phase] = self._counts.get(phase, 0) + 1
        entry = {"phase": phase, "event": operation.event, "path": str(operation.path)}
        os.write(self._file, (json.dumps(entry) + "\n").encode())
        if self._stop_at is not None:
            aimed, number = self._stop_at
            late = PHASES.index(phase) - PHASES.index(aimed)
            if late < 0 or (late == 0 and self._counts[phase] != number):
                return
            self._stop_at = None
            os.kill(os.getpid(), signal.SIGSTOP)
            return
        self._again -= 1
        if self._again == 0:
            os.kill(os.getpid(), signal.SIGSTOP)


def _become(output: Path, stdout: str, *argv: str) -> None:
    """Makes the fork what a shell would have started."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    gc.freeze()  # What was imported is never collected: the fork need not look through it.
    os.chdir(output)
    writes = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, stdout, writes), (2, "stderr.txt", writes)):
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    sys.argv = ["sku", *argv]
    os.environ["COLUMNS"] = "200"


def _code_of_sku() -> int:
    """Runs ``sku`` as the interpreter would: an error that nobody catches is printed with its traceback."""
    from sku.__main__ import main

    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        return 1
    return 0
