"""Memory that ran out, in one line that names the stage and the settings that need less."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sku.errors import NoMemoryError, SkuError, first_line

_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Of errors that torch raises as plain ``RuntimeError``: on a CPU, on MPS, and inside a library of CUDA."""
_TRAINING = (
    "--set acquire.training.activation_checkpointing=true, a smaller acquire.training.per_device_train_batch_size "
    "(with as much more gradient_accumulation_steps the steps stay the same), a smaller data.max_length, or "
    "acquire.tuning=qlora; `sku plan` says what each needs"
)
_EVALUATION = "a smaller evaluate.batch_size, or a smaller evaluate.max_new_tokens"
_WEIGHTS = "--set model.dtype=bfloat16, acquire.tuning=lora where all weights are trained, or a larger machine"
_HELPS = {
    "load": _WEIGHTS,
    "own": "a smaller data.own.batch_size, or a smaller data.own.max_new_tokens",
    "acquire": _TRAINING,
    "negate": f"{_WEIGHTS}; `sku acquire` and then `sku negate` go from file to file and need hardly any",
    "sweep": f"{_EVALUATION}, or negate.alpha as a number",
    "evaluate": _EVALUATION,
    "precisions": f"{_EVALUATION}, or fewer evaluate.precisions",
    "attacks": f"{_EVALUATION}, or fewer evaluate.attacks",
}


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
        helps = _HELPS.get(name or "", f"in training {_TRAINING}; in evaluation {_EVALUATION}")
        # The first sentence has the size that was asked for; the others are of torch's own allocator.
        said = first_line(error).partition(". ")[0]
        raise NoMemoryError(f"memory ran out{where} ({said}); what needs less: {helps}") from error


def _ran_out(error: Exception) -> bool:
    if isinstance(error, SkuError):
        return False
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
