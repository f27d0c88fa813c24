"""``--quiet`` and ``--verbose``: how much a command says besides its results and errors."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import sku
from sku import quiet
from sku.cli.console import errors, notes
from sku.redaction import without_secret_addresses

Loudness = Literal["quiet", "usual", "verbose"]
_LOGGERS = ("accelerate", "bitsandbytes", "datasets", "httpx", "huggingface_hub", "lm_eval", "peft", "transformers")
"""Libraries that speak under ``--verbose``, at level INFO; below it some log what they are asked."""


class _LibraryPrinter(logging.Handler):
    """Prints what libraries log, without tokens and signed addresses."""

    def emit(self, record: logging.LogRecord) -> None:
        notes.print(f"{record.name}: {without_secret_addresses(record.getMessage())}", soft_wrap=True)


_PRINTER = _LibraryPrinter(logging.INFO)
_levels: dict[str, int] = {}
"""Of loggers that ``verbose`` has turned on, as they were before."""
_loudness: Loudness = "usual"


def set_loudness(loudness: Loudness) -> None:
    """Sets how much this process says, from the next line on.

    Args:
        loudness: ``quiet`` leaves results and errors; ``verbose`` adds what libraries log, and causes of errors.
    """
    global _loudness
    _loudness = loudness
    notes.quiet = loudness == "quiet"
    logging.disable(logging.WARNING if notes.quiet else logging.NOTSET)
    if notes.quiet:
        warnings.simplefilter("ignore")
    quiet.let_libraries_speak(loudness == "verbose")
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.removeHandler(_PRINTER)
        if loudness == "verbose":
            _levels.setdefault(name, logger.level)
            logger.addHandler(_PRINTER)
            logger.setLevel(logging.INFO)
        elif name in _levels:
            logger.setLevel(_levels.pop(name))


def is_verbose() -> bool:
    """Whether ``--verbose`` was given."""
    return _loudness == "verbose"


def print_cause(error: BaseException) -> None:
    """Under ``--verbose``: what raised an error and what led to it, by kind and place, innermost last.

    Messages of other packages are left out: they can hold a row of the data or an address with a key. What of them a
    user needs stands in the error's own line.

    Args:
        error: That was printed.
    """
    if _loudness == "verbose":
        for number, link in enumerate(_chain(error)):
            errors.print(
                f"{'caused by' if number else 'raised':<10}{type(link).__name__} at {_place(link)}", soft_wrap=True
            )


def _chain(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _place(error: BaseException) -> str:
    """File, line and function in which an error was raised; the file without what is the same on this machine."""
    traceback = error.__traceback__
    if traceback is None:
        return "an unknown place"
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code, path = traceback.tb_frame.f_code, Path(traceback.tb_frame.f_code.co_filename)
    package = Path(sku.__file__).parent.parent
    for part in (package, *(parent for parent in path.parents if parent.name == "site-packages")):
        if path.is_relative_to(part):
            path = path.relative_to(part)
            break
    return f"{path}:{traceback.tb_lineno} in {code.co_name}"
