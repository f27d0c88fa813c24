"""Several processes under ``accelerate launch`` or ``torchrun``: all compute, the first one writes and prints.

A Python error in one process reaches the others at the next point where they meet, as a ``ProcessError``. A process
that dies without one (killed, out of memory) is seen by the launcher, which ends the others, and on CPUs (gloo) by the
others as well. Without a launcher processes on GPUs wait for ``TIMEOUT`` at most.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from sku.errors import ProcessError, RecipeError
from sku.storage import new_folder

T = TypeVar("T")

TIMEOUT = timedelta(hours=12)
"""Longest wait for another process; judging by a hosted judge, which only one process does, may take hours."""
TOLD = "sku: the other processes know of this"
"""Note on an error that reached the first process, which speaks for all."""
_LOST = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Socket Timeout",
    "remote process exited",
)
"""What gloo, NCCL and the store say when another process is gone."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of this job, seen from one of them."""

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and judges."""
        return self.rank == 0

    def run_on_rank0(self, action: Callable[[], T]) -> T:
        """Runs something in the main process alone.

        Args:
            action: Called once; its result must be picklable where there are several processes.

        Returns:
            Its result, in every process.

        Raises:
            ProcessError: In the other processes, where it failed in the main one; there its own error is raised. Also
                where a process died.
        """
        (result,) = self.gather(lambda: [action()] if self.is_main else [])
        return result

    def gather(self, action: Callable[[], list[T]]) -> list[T]:
        """Runs something in every process and puts the results together, in the order of the processes.

        Args:
            action: Called in each process; its result must be picklable where there are several.

        Returns:
            All results, in every process.

        Raises:
            ProcessError: In the other processes, where it failed in one; there its own error is raised. Also where a
                process died.
        """
        if self.count == 1:
            return action()
        try:
            own: list[T] | str = action()
        except Exception as error:
            if not isinstance(error, ProcessError):  # The others are gone, or have raised it themselves.
                with lost_processes_named():
                    gather_object([str(error)])
                error.add_note(TOLD)
            raise
        with lost_processes_named():
            parts: list[list[T] | str] = gather_object([own])
        for rank, part in enumerate(parts):
            if isinstance(part, str):
                raise ProcessError(f"process {rank} of {self.count} failed: {part}")
        return [entry for part in parts if isinstance(part, list) for entry in part]

    def run_on_all_ranks(self, action: Callable[[], T]) -> T:
        """Runs something in every process; each keeps its own result, and none goes on where one failed.

        The action must not wait for the other processes itself.

        Args:
            action: Called in each process.

        Returns:
            This process's result.

        Raises:
            ProcessError: As ``gather``.
        """
        own: list[T] = []
        self.gather(lambda: own.append(action()) or [])  # type: ignore[func-returns-value]
        return own[0]


ALONE = Processes()
"""A job of one process."""


def current_processes() -> Processes:
    """The processes of this job; must be asked before a model is loaded, so that each takes its own GPU.

    Raises:
        RecipeError: The launcher's settings would leave processes other than the first without weights.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ALONE
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        raise RecipeError(
            "fsdp_cpu_ram_efficient_loading would leave all processes but the first with empty weights, and all "
            "evaluate: set it to false in the configuration of accelerate (docs/scaling.md)"
        )
    state = PartialState(
        cpu=not torch.accelerator.is_available() or "ACCELERATE_USE_CPU" in os.environ, timeout=TIMEOUT
    )
    return Processes(rank=state.process_index, count=state.num_processes)


@contextmanager
def shared_new_folder(processes: Processes, target: Path) -> Iterator[Path]:
    """A private ``storage.new_folder`` for several processes: the first one makes and renames it, all know its place.

    Args:
        processes: Of this job.
        target: Folder that must not exist yet, on a disk that all share where they write into it.

    Yields:
        The temporary folder, the same in every process.

    Raises:
        OutputError: As ``new_folder``.
        ProcessError: The same, in the other processes.
    """
    with ExitStack() as stack:
        yield processes.run_on_rank0(lambda: stack.enter_context(new_folder(target, private=True)))
        processes.run_on_rank0(stack.close)


@contextmanager
def lost_processes_named() -> Iterator[None]:
    """Turns what torch raises when another process is gone into one line.

    Raises:
        ProcessError: In place of gloo's, NCCL's or the store's error.
    """
    try:
        yield
    except RuntimeError as error:
        if is_together() and any(sign in str(error) for sign in _LOST):
            raise ProcessError(_lost_text()) from error
        raise


def end_when_the_launcher_says_so(processes: Processes) -> None:
    """Makes SIGTERM, by which a launcher ends the processes that are left when one died, a ``ProcessError``."""
    if processes.count > 1:
        signal.signal(signal.SIGTERM, _ended)


def _ended(_signal: int, _frame: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise ProcessError(_lost_text())


def _lost_text() -> str:
    count = os.environ.get("WORLD_SIZE", "1")
    return (
        f"one of the {count} processes was killed, ran out of memory, or can't be reached; sku run goes on from the "
        "last checkpoint with the same command, the same --out and --resume"
    )


def is_together() -> bool:
    """Whether the processes of this job have met."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
