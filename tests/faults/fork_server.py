"""A process that has imported all that ``sku run`` needs, and forks a child for each command: no import is paid twice.

A child is ``sku`` as a shell would start it: the same entry point, files as its output, and exit
handlers at its end. One JSON object a line comes in and one goes out:

- ``{"argv": [...], "output": FOLDER, "watch": FOLDER, "run": FOLDER, ...}`` -> ``{"pid": ...}``. With ``stop_at:
  [PHASE, N]`` the child stops (SIGSTOP) before its N-th file operation in that phase, or before the first one of a
  later phase; with ``again: M`` a second time, M operations later. It notes its operations in
  ``OUTPUT/operations.jsonl``. With ``fault`` the disk takes nothing more from there on, instead of a stop
  (``full_disk``); with ``branch`` that happens in a fork of the child at each operation.
- ``{"wait": PID}`` -> ``{"stopped": true}``, or ``{"stopped": false, "status": ...}`` as ``os.waitpid`` has it.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from faults.file_operations import Operation, watch
from faults.full_disk import Branches, FullDisk
from faults.phases import PHASES, phase_of

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def _import_everything() -> None:
    """What a run imports, sooner or later, without running anything."""
    from sku.progress import quiet_imports, quiet_libraries

    quiet_imports()
    import matplotlib.backends.backend_agg
    import matplotlib.backends.backend_svg  # noqa: F401
    import peft  # noqa: F401
    import PIL.Image
    import rouge_score.rouge_scorer  # noqa: F401
    import transformers.models.llama.modeling_llama
    import transformers.trainer  # noqa: F401

    import sku.__main__
    import sku.pipeline.negate
    import sku.pipeline.run
    import sku.pipeline.stages  # noqa: F401

    quiet_libraries()
    PIL.Image.preinit()
    gc.freeze()  # What was imported is never collected: children need not look through it.


class _Watcher:
    """Notes each operation, and lets the fault happen at one of them."""

    def __init__(self, command: dict[str, Any]) -> None:
        self._run, self._keeps_bad = Path(command["run"]), bool(command.get("keeps_bad"))
        self._stop_at: tuple[str, int] | None = None
        if command.get("stop_at"):
            phase, number = command["stop_at"]
            self._stop_at = (phase, number)
        self._file = os.open(Path(command["output"]) / "operations.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._counts: dict[str, int] = {}
        self._again: int | None = command.get("again")
        self._disk = FullDisk(command["fault"]) if "fault" in command else None

    def see(self, operation: Operation) -> None:
        phase = phase_of(self._run, keeps_bad=self._keeps_bad)
        self._counts[phase] = self._counts.get(phase, 0) + 1
        entry = {"phase": phase, "event": operation.event, "path": str(operation.path)}
        os.write(self._file, (json.dumps(entry) + "\n").encode())
        if self._stop_at is None:
            self._after(operation)
            return
        aimed, number = self._stop_at
        late = PHASES.index(phase) - PHASES.index(aimed)
        if late > 0 or (late == 0 and self._counts[phase] == number):
            self._stop_at = None
            if self._disk is None:
                os.kill(os.getpid(), signal.SIGSTOP)
            else:
                self._disk.strike()
                self._disk.see(operation)

    def _after(self, operation: Operation) -> None:
        if self._disk is not None:
            self._disk.see(operation)
        if self._again is not None:
            self._again -= 1
            if self._again == 0:
                os.kill(os.getpid(), signal.SIGSTOP)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def _become(command: dict[str, Any]) -> None:
    """Makes the forked process what a shell would have started."""
    _die_with_parent()
    output = Path(command["output"])
    for number, name in ((0, None), (1, "stdout"), (2, "stderr")):
        flags = os.O_RDONLY if name is None else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        path = os.devnull if name is None else command.get(name) or output / f"{name}.txt"
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    if "branch" in command:
        import sku.progress

        # Without the thread that prints them again: a fork would copy its locks.
        sku.progress.Lines.repeat = lambda self, wait: None  # type: ignore[method-assign]
    sys.argv = ["sku", *command["argv"]]
    os.chdir(output)


def _serve() -> dict[str, Any] | None:
    """Answers requests; a child returns its command, the server None when nobody asks any more."""
    channel_in, channel_out = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # Whatever is printed here must not look like an answer.
    print("{}", file=channel_out, flush=True)
    for line in channel_in:
        request: dict[str, Any] = json.loads(line)
        answer: dict[str, Any]
        if "wait" in request:
            _, status = os.waitpid(request["wait"], os.WUNTRACED)
            stopped = os.WIFSTOPPED(status)
            answer = {"stopped": stopped, **({} if stopped else {"status": status})}
        else:
            pid = os.fork()
            if pid == 0:
                channel_in.close()
                channel_out.close()
                return request
            answer = {"pid": pid}
        print(json.dumps(answer), file=channel_out, flush=True)
    return None


def main() -> None:
    """Serves until standard input ends; in a child, runs its command."""
    _die_with_parent()
    _import_everything()
    command = _serve()
    if command is None:
        return
    _become(command)
    if command.get("watch"):
        watch(Path(command["watch"]), (Branches if "branch" in command else _Watcher)(command).see)
    _end(_code_of_sku())


def _code_of_sku() -> int:
    """Runs ``sku`` as the interpreter would: an error that nobody catches is printed with its traceback."""
    from sku.__main__ import main as sku

    try:
        sku()
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        return 1
    return 0


def _end(code: int) -> None:
    """The interpreter's end, less the freeing of all that the server had imported, which takes a second."""
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:
        sys.stderr.write(f"Exception ignored while flushing sys.stdout: {error}\n")
        code = 120
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
