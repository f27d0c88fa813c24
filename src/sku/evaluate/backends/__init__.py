"""What writes the replies: one file a backend, behind one protocol, and the choice by name."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from sku.config import EvaluateConfig
from sku.errors import EvaluationError
from sku.evaluate.backends.base import GenerationBackend
from sku.evaluate.backends.generate import GenerateBackend
from sku.evaluate.backends.vllm_engine import VllmBackend


def choose_backend(
    config: EvaluateConfig, model: PreTrainedModel, *, source: str | Path | None, seed: int, processes: int = 1
) -> GenerationBackend:
    """The backend that ``evaluate.backend`` names.

    Args:
        config: Name and batch size.
        model: The model to evaluate.
        source: Where the same weights can be read from, for ``vllm``; None for a model that is in memory only.
        seed: Of the evaluation.
        processes: Number of processes of this job.

    Returns:
        The backend.

    Raises:
        EvaluationError: vLLM is missing, doesn't start, or has no folder to read.
    """
    if config.backend == "generate":
        return GenerateBackend(model, config.batch_size)
    check_source(config, source, processes)
    return VllmBackend(str(source), str(model.dtype).removeprefix("torch."), config.batch_size, seed)


def check_source(config: EvaluateConfig, source: str | Path | None, processes: int) -> None:
    """Refuses ``vllm`` where it can't be used.

    Args:
        config: Names the backend; the others can always be used.
        source: As in ``choose_backend``.
        processes: As in ``choose_backend``.

    Raises:
        EvaluationError: The model lies in no folder, or there are several processes.
    """
    if config.backend != "vllm":
        return
    if source is None:
        raise EvaluationError(
            "evaluate.backend is vllm, which reads the model from a folder, and this one is in memory only: save it, "
            "then sku evaluate FOLDER --set evaluate.backend=vllm"
        )
    if processes > 1:
        raise EvaluationError("evaluate.backend is vllm, which starts its own processes: run it without accelerate")
