"""``sku``: the command line. Each command parses, calls one function and prints."""

from __future__ import annotations

import atexit
import errno
import gc
import os
import signal
import sys
from contextlib import suppress
from typing import Annotated, NoReturn

import typer

from sku._version import __version__
from sku.cli import chat, compare, data, init, judge, report, run, sweep
from sku.cli.console import errors, print_error, set_loudness
from sku.errors import ProcessError, SkuError, named_memory_errors

app = typer.Typer(
    name="sku",
    help="From a model that answers harmful prompts to one that no longer does, with the evidence.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    *(run.run, init.init, run.acquire, run.negate, sweep.sweep, run.evaluate, compare.compare, report.push),
    *(run.wipe, init.doctor, report.results, report.report, chat.chat),
):
    app.command(command.__name__)(command)
app.add_typer(data.app, name="data")
app.add_typer(judge.app, name="judge")


INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C, as shells have it."""
TERMINATED = 128 + signal.SIGTERM
"""Exit code after SIGTERM."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What printing into a file meets."""


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"sku {__version__}")
        raise typer.Exit


# A last search for garbage among the thousands of objects that torch makes takes a third of a second, for nothing: the
# memory goes back all the same. Registered before heavy libraries are imported, so that it runs after what they do.
atexit.register(gc.freeze)


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print results and errors only: no progress, no messages.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print all measures and notes.")] = False,
) -> None:
    """Options of every command; they stand before its name."""
    set_loudness("quiet" if quiet else "verbose" if verbose else "usual")


def _speaks(error: SkuError) -> bool:
    """Whether this process of several prints an error: the first one does, and one whose error no other knows."""
    if os.environ.get("RANK", "0") == "0":
        return True
    distributed = sys.modules.get("sku.processes")
    if distributed is None or not distributed.is_together():
        return False  # Before they meet, all do the same.
    return not isinstance(error, ProcessError) and distributed.TOLD not in getattr(error, "__notes__", ())


def main() -> None:
    """Entry point: a mistake of the user is one line and exit code 2, Ctrl-C exit code 130, SIGTERM 143."""
    terminated = False

    def interrupt(_signal: int, _frame: object) -> NoReturn:
        nonlocal terminated
        terminated = True
        raise KeyboardInterrupt

    # A scheduler's SIGTERM must leave no more behind than Ctrl-C does.
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with named_memory_errors():
            app()
    except SkuError as error:
        if _speaks(error):
            print_error(str(error))
        sys.exit(2)
    except OSError as error:
        if error.filename is not None or error.errno not in _FULL:
            raise
        print_error(f"standard output can't be written: {error.strerror}")
        with suppress(OSError):  # What is left of it must not fail again; a test's is no file of the system.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
        # Typer makes an exit of an interrupt that no command has answered.
        if end.__context__ is not None and isinstance(end.__context__.__cause__, KeyboardInterrupt):
            errors.print("interrupted")
        sys.exit(TERMINATED if terminated else INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
