"""The plain backend: transformers' ``generate`` on a batch of prompts. The others are checked against it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from sku.evaluate.backends.base import Decoding, GenerationRequest, only_these_settings
from sku.evaluate.batching import pad
from sku.evaluate.row_sampling import RowSampler
from sku.models import embedding_weight


class GenerateBackend:
    """``generate`` with padding on the left, on any device or a model spread over several."""

    def __init__(self, model: PreTrainedModel, batch_size: int) -> None:
        """Takes a model in evaluation mode.

        Args:
            model: It is not changed.
            batch_size: Prompts at once.
        """
        self._model = model
        self.at_once = batch_size

    def answer(self, requests: Sequence[GenerationRequest], decoding: Decoding) -> list[list[int]]:
        """As the protocol says."""
        device = embedding_weight(self._model).device
        ids, mask = pad([request.input_ids for request in requests], decoding.pad_id, left=True, device=device)
        settings = decoding.generation_config()
        drawing = decoding.drawing
        hooks: dict[str, Any] = {}
        if drawing is not None:
            seeds = [drawing.row_seed(request.id) for request in requests]
            hooks["logits_processor"] = LogitsProcessorList([RowSampler(seeds, drawing, device)])
        with only_these_settings(self._model, settings), torch.inference_mode():
            output = cast(Any, self._model).generate(
                input_ids=ids, attention_mask=mask, generation_config=settings, **hooks
            )
        return cast(list[list[int]], output[:, ids.shape[1] :].tolist())
