"""transformers' continuous batching, ``generate_batch``: a place in the batch is filled again when a reply ends.

It runs on CPU and GPU with the attention implementations sdpa and flash; eager is exchanged for its paged form while
it runs. It draws all rows from one generator, so samples, which must not depend on their neighbours, are left to
``generate``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

from transformers import ContinuousBatchingConfig, PreTrainedModel

from sku.errors import EvaluationError
from sku.evaluate.backends.base import Decoding, GenerationRequest, by_room, only_these_settings
from sku.models import plain_model

_CALLS_AT_ONCE = 16
"""Batches a call: setting up the paged cache costs seconds, and replies are saved only between calls."""
_PAGE = 32
"""Tokens a page: prompts and replies here are short."""


class ContinuousBackend:
    """``generate_batch``; greedy only."""

    def __init__(self, model: PreTrainedModel, batch_size: int) -> None:
        """Takes a model in evaluation mode.

        Args:
            model: Its attention implementation is put back after each call.
            batch_size: Replies that grow at the same time.
        """
        self._model = model
        self._batch_size = batch_size
        self.at_once = _CALLS_AT_ONCE * batch_size

    def answer(self, requests: Sequence[GenerationRequest], decoding: Decoding) -> list[list[int]]:
        """As the protocol says."""
        if decoding.sampling is not None:
            raise EvaluationError("generate_batch draws all replies from one generator: draw samples with generate")
        found: dict[int, list[int]] = {}
        for room, places in by_room(requests, decoding).items():
            replies = self._continued([list(requests[place].input_ids) for place in places], decoding, room)
            found |= dict(zip(places, replies, strict=True))
        return [found[place] for place in range(len(requests))]

    def _continued(self, prompts: Sequence[list[int]], decoding: Decoding, new_tokens: int) -> list[list[int]]:
        """Replies of at most ``new_tokens`` tokens."""
        settings = decoding.generation_config(new_tokens)
        inner = plain_model(self._model)
        attention = inner.config._attn_implementation
        try:
            # No inference mode: the replies are written by a thread of transformers' own, outside of it.
            with only_these_settings(self._model, settings):
                found = cast(Any, self._model).generate_batch(
                    prompts,
                    generation_config=settings,
                    continuous_batching_config=self._cache_for(prompts, new_tokens),
                )
        finally:
            if inner.config._attn_implementation != attention:
                inner.set_attn_implementation(attention)
        replies = list(found.values())
        failed = next((reply.error for reply in replies if reply.error is not None), None)
        if failed is not None or len(replies) != len(prompts):
            reason = " ".join(str(failed or f"{len(replies)} of {len(prompts)} replies came back").split())
            raise EvaluationError(f"generate_batch failed ({reason}): use evaluate.backend=generate")
        return [list(reply.generated_tokens) for reply in replies]

    def _cache_for(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> ContinuousBatchingConfig:
        """Room for a full batch of the longest prompts: left alone it takes most of the machine's free memory."""
        longest = max(map(len, prompts))
        pages = math.ceil((longest + new_tokens) / _PAGE) + 1
        places = min(self._batch_size, len(prompts))
        return ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=(places + 1) * pages,
            max_batch_tokens=max(longest, 512) + places,
            max_requests_per_batch=places,
            allow_block_sharing=False,
            auto_switch_to_flash=False,
        )
