"""vLLM, an engine of its own that reads the model from a folder; to be installed apart.

It decodes with the stop ids, length, temperature, top-p and seeds of the evaluation and with nothing of the model's
``generation_config``. Its sampled replies are other draws from the same distribution than those of ``generate``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sku.errors import EvaluationError, first_line
from sku.evaluate.backends.base import Decoding, GenerationRequest

_CALLS_AT_ONCE = 16
_FREE_SHARE = 0.85
"""Of the GPU memory that is free: the evaluated model is there already."""


class VllmBackend:
    """``vllm.LLM`` on token ids."""

    def __init__(self, source: str, dtype: str, batch_size: int, seed: int) -> None:
        """Starts the engine.

        Args:
            source: Folder or hub id of the model, with weights in the form of transformers.
            dtype: Of the evaluated model, such as ``bfloat16``.
            batch_size: Replies are saved after 16 times as many.
            seed: Of the engine; sampled replies have seeds of their own.

        Raises:
            EvaluationError: vLLM is missing or doesn't start.
        """
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise EvaluationError(
                f"evaluate.backend is vllm, which can't be imported ({error}): pip install vllm in an environment "
                "whose torch and transformers it accepts, or use evaluate.backend=generate"
            ) from None
        options: dict[str, Any] = {"model": source, "dtype": dtype, "seed": seed, "generation_config": "vllm"}
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            options["gpu_memory_utilization"] = _FREE_SHARE * free / total
        try:
            self._engine = LLM(**options)
        except (RuntimeError, ValueError, OSError) as error:
            reason = first_line(error)
            raise EvaluationError(f"vllm can't start on {source} ({reason}): use evaluate.backend=generate") from error
        self._params = SamplingParams
        self.at_once = _CALLS_AT_ONCE * batch_size

    def answer(self, requests: Sequence[GenerationRequest], decoding: Decoding) -> list[list[int]]:
        """As the protocol says."""
        found = self._engine.generate(
            [{"prompt_token_ids": list(request.input_ids)} for request in requests],
            [self._params(**self._settings(request, decoding)) for request in requests],
            use_tqdm=False,
        )
        if len(found) != len(requests):
            raise EvaluationError(f"vllm gave {len(found)} replies to {len(requests)} prompts")
        return [_ids_of(output.outputs[0], decoding) for output in found]

    def _settings(self, request: GenerationRequest, decoding: Decoding) -> dict[str, Any]:
        shared: dict[str, Any] = {
            "max_tokens": decoding.room_of(request), "stop_token_ids": list(decoding.stop_ids), "detokenize": False,
        }  # fmt: skip
        sampling = decoding.sampling
        if sampling is None:
            return {**shared, "temperature": 0.0}
        return {
            **shared,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.row_seed(request.id),
        }


def _ids_of(completion: Any, decoding: Decoding) -> list[int]:
    ids = list(completion.token_ids)
    if completion.finish_reason == "stop" and not set(ids) & set(decoding.stop_ids):
        ids.append(decoding.stop_ids[0])  # The reply ended itself, and the engine kept the id to itself.
    return ids
