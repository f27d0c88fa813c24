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
    +-- NoMemoryError       memory ran out                                   (MemoryError)
    +-- ProcessError        another process of the job failed or died        (RuntimeError)
    +-- OutputError         a folder that can't be written or already exists (OSError)

A message is one line that says what is wrong, where, and what to do. The command line prints it and exits with 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Of torch's errors, which are all ``RuntimeError``: on a GPU, on a CPU, on MPS, and inside a library of CUDA."""
_TRAINING = (
    "--set acquire.training.activation_checkpointing=true, a smaller acquire.training.per_device_train_batch_size "
    "(with as much more gradient_accumulation_steps the steps stay the same), a smaller data.max_length, or "
    "acquire.tuning=qlora; `sku run --dry-run` says what each needs"
)
_EVALUATION = "a smaller evaluate.batch_size, or a smaller evaluate.max_new_tokens"
_WEIGHTS = "--set model.dtype=bfloat16, acquire.tuning=lora where all weights are trained, or a larger machine"
_NEEDS_LESS = {
    "load": _WEIGHTS,
    "own": "`sku data own --set batch_size=8`, whose files the run is then given",
    "acquire": _TRAINING,
    "negate": f"{_WEIGHTS}; `sku acquire` and then `sku negate` go from file to file and need hardly any",
    "sweep": f"{_EVALUATION}, or negate.alpha as a number",
    "evaluate": _EVALUATION,
    "attacks": f"{_EVALUATION}, or fewer evaluate.attacks",
}


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


class NoMemoryError(SkuError, MemoryError):
    """Memory of a GPU or of the computer ran out; the message names settings that need less."""


class ProcessError(SkuError, RuntimeError):
    """Another process of a job under ``accelerate launch`` or ``torchrun`` failed or died."""


class OutputError(SkuError, OSError):
    """An output folder can't be written."""


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """A suggestion for the end of an error message, `` Did you mean X?``, empty where nothing is close.

    Args:
        wrong: What the user wrote.
        known: What would have been right.
    """
    close = difflib.get_close_matches(wrong, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def no_method_named(name: str, known: Iterable[str]) -> RecipeError:
    """What to raise where a recipe or a command names a method that there isn't."""
    names = list(known)
    return RecipeError(
        f"there is no method named {name}.{did_you_mean(name, names)} Known: {', '.join(names)}; or give a .py file "
        "that defines one"
    )


def one_line(error: BaseException) -> str:
    """All that an error of another package says, in one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of what an error of another package says; its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def named_memory_errors(stage: str | None = None) -> Iterator[None]:
    """Turns memory that ran out into one line.

    Args:
        stage: What is done in the block, as a run's manifest names it; None where it may be any.

    Raises:
        NoMemoryError: In place of what was raised.
    """
    try:
        yield
    except Exception as error:
        if not _ran_out(error):
            raise
        name = None if stage is None else stage.partition("_")[0]
        where = "" if name is None else f" in {stage}"
        helps = _NEEDS_LESS.get(name or "", f"in training {_TRAINING}; in evaluation {_EVALUATION}")
        # The first sentence has the size that was asked for; the others are of torch's own allocator.
        said = first_line(error).partition(". ")[0]
        raise NoMemoryError(f"memory ran out{where} ({said}); what needs less: {helps}") from error


def _ran_out(error: Exception) -> bool:
    if isinstance(error, SkuError):
        return False
    says_so = isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    return says_so or isinstance(error, MemoryError)
