"""Every error a user of SKU can meet.

::

    SkuError
    +-- RecipeError         a recipe, a flag or a configuration value        (ValueError)
    +-- DataError           a data file, a column, a split                   (ValueError)
    +-- ModelError          a model or tokenizer that can't be used          (ValueError)
    +-- TaskVectorError     weights that can't be subtracted                 (ValueError)
    +-- NonFiniteLossError  stage 1 met NaN or infinity                      (ArithmeticError)
    +-- EvaluationError     nothing to measure, or records that don't fit    (ValueError)
    +-- NoAlphaError        no alpha does what the recipe's sweep asks for   (ValueError)
    +-- ProcessError        another process of the job failed or died        (RuntimeError)
    +-- OutputError         a folder that can't be written or already exists (OSError)

A message is one line that says what is wrong, where, and what to do. The command line prints it and exits with 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SkuError(Exception):
    """Base of all errors raised on purpose by this package."""


class RecipeError(SkuError, ValueError):
    """A recipe, a flag or a configuration value is wrong."""


class DataError(SkuError, ValueError):
    """Data can't be read, or would train or measure the wrong thing."""


class ModelError(SkuError, ValueError):
    """A model or tokenizer can't be loaded or used."""


class TaskVectorError(SkuError, ValueError):
    """Two sets of weights can't be subtracted exactly."""


class NonFiniteLossError(SkuError, ArithmeticError):
    """A loss term or the gradient of stage 1 is NaN or infinite; no optimizer step was taken with it."""


class EvaluationError(SkuError, ValueError):
    """An evaluation has nothing to measure or its records don't fit together."""


class NoAlphaError(SkuError, ValueError):
    """All was measured, and no alpha does what the recipe's ``sweep`` asks for."""


class ProcessError(SkuError, RuntimeError):
    """Another process of a job under ``accelerate launch`` or ``torchrun`` failed or died."""


class OutputError(SkuError, OSError):
    """An output folder can't be written."""


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """A suggestion for the end of an error message, empty where nothing is close.

    Args:
        wrong: What the user wrote.
        known: What would have been right.

    Returns:
        ``" Did you mean X?"`` or ``""``.
    """
    close = difflib.get_close_matches(wrong, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def one_line(error: BaseException) -> str:
    """All that an error of another package says, in one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of what an error of another package says; its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
