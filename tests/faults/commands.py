"""``sku`` commands as forked processes that can be stopped, signalled and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "src"


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """Exit code; minus the signal where one ended it."""
    out: str
    err: str


class Command:
    """A command that has been started."""

    def __init__(self, server: ForkServer, pid: int, output: Path) -> None:
        """Only the server makes one."""
        self._server, self.pid, self._output = server, pid, output

    def stops(self) -> bool:
        """Waits until it stops or ends; whether it stopped."""
        answer = self._server.ask({"wait": self.pid})
        if not answer["stopped"]:
            self._status: int = answer["status"]
        return bool(answer["stopped"])

    def send(self, sent: signal.Signals, *, after: float = 0) -> None:
        """Sends a signal to a stopped command, which goes on first for some seconds where it is told to.

        Args:
            sent: The signal.
            after: Seconds. Where it ends sooner, nothing is sent.
        """
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

    def operations(self) -> list[dict[str, str]]:
        """The file operations that it was watched at: ``phase``, ``event``, ``path``."""
        lines = (self._output / "operations.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def branches(self) -> list[dict[str, Any]]:
        """Each fork with a full disk: ``event``, ``path``, ``fault``, ``code``, ``err``, ``out``, ``left`` (files)."""
        lines = (self._output / "branches.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


class ForkServer:
    """The process that forks commands."""

    def __init__(self, folder: Path) -> None:
        """Starts it.

        Args:
            folder: For what commands print.
        """
        self._folder, self._count = folder, 0
        environment = {
            **os.environ, "PYTHONPATH": f"{PACKAGE}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1", "COLUMNS": "200",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-m", "faults.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        assert self._answer() == {}

    def start(self, *argv: object, watch: Path, run: Path, **faults: Any) -> Command:
        """Starts ``sku ARGV``.

        Args:
            *argv: Of the command.
            watch: Folder below which file operations are seen.
            run: The run's folder, which tells the phase.
            **faults: What ``fork_server`` takes besides.
        """
        self._count += 1
        output = self._folder / str(self._count)
        output.mkdir()
        places = {"output": str(output), "watch": str(watch), "run": str(run)}
        asked = {"argv": [str(word) for word in argv], **places, **faults}
        return Command(self, self.ask(asked)["pid"], output)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request and its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the server, and with it what it started."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the fork server died"
        answer: dict[str, Any] = json.loads(line)
        return answer
