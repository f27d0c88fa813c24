"""A process of its own that answers calls one at a time.

Light to import: there, libraries are told to be quiet before what is called brings them in.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from sku.errors import ProcessError
from sku.quiet import quiet_libraries


class OtherProcess:
    """Another process, and this end of the pipe to it."""

    def __init__(
        self,
        make: Callable[..., Callable[[Any], Any]],
        *arguments: Any,
        progress: Callable[[str, int, int], None] | None,
    ) -> None:
        """Starts it.

        Args:
            make: Called there with the arguments and a progress, for what answers. All that is passed is pickled.
            *arguments: Of ``make``.
            progress: Called here with what is told there.
        """
        self._progress, context = progress, multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_answer, args=(there,))
        self._process.start()
        there.close()  # Held by the other process alone, so that its death ends the pipe.
        with suppress(OSError):  # If it is dead already, the first call says so.
            self._pipe.send((make, arguments))

    def call(self, argument: Any) -> Any:
        """Its answer.

        Raises:
            ProcessError: The process died.
            Exception: What the call raised there.
        """
        kind, content = self._exchanged(argument)
        while kind == "progress":
            if self._progress is not None:
                self._progress(*content)
            kind, content = self._exchanged()
        if kind == "error":
            raise content
        return content

    def _exchanged(self, *arguments: Any) -> tuple[str, Any]:
        try:
            for argument in arguments:
                self._pipe.send(argument)
            message: tuple[str, Any] = self._pipe.recv()
        except (EOFError, OSError):
            raise ProcessError(
                "the process died without a word: most likely it was killed because memory ran out"
            ) from None
        return message

    def end(self, *, at_once: bool = False) -> None:
        """Waits until it has ended; ``at_once``: without what it is about to answer."""
        if at_once:
            self._process.terminate()
        self._pipe.close()
        self._process.join()


def _answer(pipe: Connection) -> None:
    """What runs there, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # It reaches both processes; the first one says what it ends.
    quiet_libraries()

    def tell(*message: Any) -> None:
        with suppress(OSError):  # What was begun for a process that was killed is finished, and kept for the next.
            pipe.send(("progress", message))

    with suppress(EOFError, OSError):
        make, arguments = pipe.recv()
        answer = make(*arguments, tell)
        while True:
            argument = pipe.recv()
            try:
                message = "answer", answer(argument)
            except Exception as error:  # noqa: BLE001 - it is raised again in the first process
                message = "error", error
            pipe.send(message)
