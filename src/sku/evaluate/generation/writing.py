"""Requests become replies, batch by batch.

``generate`` of transformers computes a whole batch until its last reply ends. Here it is called for ``CHUNK`` tokens
at a time, going on from its own cache, and replies that ended leave batch and cache between two calls: they cost
nothing more, and those that stay get the tokens that they get without it. A prompt with several replies in a batch
(sampled ones, one for each length of a prefill) is read once: each reply goes on from a copy of its cache, with what
is its own after the padding that makes all of a batch end together.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sku.data.tokens import decoded, shared_length
from sku.evaluate.generation import Progress, in_batches, pad
from sku.evaluate.generation.decoding import Decoding, GenerationRequest, RowSampler, Sampling, only_these_settings
from sku.evaluate.records import GenerationRecord, grouped
from sku.models import embedding_weight, plain_model
from sku.processes import ALONE, Processes


def _masks_padding(layer: Any, tokens: int) -> bool:
    """Whether padding between tokens is no more to a layer than padding before them.

    It is read by a layer with a state, and counted by one whose window is shorter than all there is.
    """
    wide = isinstance(layer, DynamicSlidingWindowLayer) and layer.sliding_window > tokens
    return wide or type(layer) is DynamicLayer


CHUNK = 32
"""Tokens between two looks at which replies have ended."""


class ReplyWriter:
    """``generate`` with padding on the left, on any device or a model in evaluation mode spread over several."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        takes = inspect.signature(plain_model(model).forward).parameters
        # What a cache of another name holds, as Mamba's, is left alone.
        self._drops_rows = "past_key_values" in takes
        # Without positions a model may count padding between tokens, as MPT does.
        self._reads_once = self._drops_rows and "position_ids" in takes

    def answer(self, requests: Sequence[GenerationRequest], decoding: Decoding) -> list[list[int]]:
        """The new ids of each reply, in order, with the stop id where it ended itself; what follows it is not read.

        Where ``decoding`` draws, each reply depends on its own request's seed alone.
        """
        if self._drops_rows:
            replies = self._replies(requests, decoding, CHUNK)
            if replies is not None:
                return replies
            self._drops_rows = False
        # All rows of a call end at one limit.
        found: dict[str, list[int]] = {}
        for limit, same in grouped(requests, decoding.max_new_tokens_for).items():
            whole = self._replies(same, decoding, limit)
            found |= dict(zip((request.id for request in same), whole or (), strict=True))
        return [found[request.id] for request in requests]

    def _replies(self, requests: Sequence[GenerationRequest], decoding: Decoding, size: int) -> list[list[int]] | None:
        """The replies, ``size`` tokens a call; None where that needs a cache that can leave rows out, and it can't."""
        device, sampling, sampler = embedding_weight(self._model).device, decoding.sampling, None
        ids, mask, cache = self._begun(requests, decoding, device)
        if sampling is not None:
            sampler = RowSampler([sampling.row_seed(request.id) for request in requests], sampling, device)
        replies: list[list[int]] = [[] for _ in requests]
        limits = [decoding.max_new_tokens_for(request) for request in requests]
        stops = set(decoding.stop_ids)
        rows = list(range(len(requests)))
        while rows:
            steps = min(size, *(limits[row] - len(replies[row]) for row in rows))
            before = ids.shape[1]
            output = self._generate(ids, mask, decoding, steps, sampler, cache)
            cache, ids = output.past_key_values, output.sequences
            stay = []
            for place, (row, new) in enumerate(zip(rows, ids[:, before:].tolist(), strict=True)):
                replies[row] += new
                if len(replies[row]) < limits[row] and stops.isdisjoint(new):
                    stay.append(place)
            if not stay:
                break
            if not isinstance(cache, Cache):
                return None
            mask = torch.cat([mask, mask.new_ones(len(rows), ids.shape[1] - before)], dim=1)
            if len(stay) < len(rows):
                kept: Any = torch.tensor(stay, device=ids.device)
                # Selects rows as beam search does, which every kind of layer knows: attention and recurrent state.
                cache.reorder_cache(kept)
                ids, mask, rows = ids[kept], mask[kept], [rows[place] for place in stay]
                if sampler is not None:
                    sampler.keep(stay)
        return replies

    def _begun(
        self, requests: Sequence[GenerationRequest], decoding: Decoding, device: torch.device
    ) -> tuple[Tensor, Tensor, Cache | None]:
        """Ids and mask of a batch; and a cache of what replies to a prompt share, where that halves what is read."""
        rows = [request.input_ids for request in requests]
        fill = functools.partial(pad, value=decoding.pad_id, left=True, device=device)
        by_prompt = grouped(requests, lambda request: request.prompt)
        if not self._reads_once or len(by_prompt) == len(rows):
            return (*fill(rows), None)
        heads = {prompt: _head([request.input_ids for request in found]) for prompt, found in by_prompt.items()}
        own = [row[len(heads[request.prompt]) :] for row, request in zip(rows, requests, strict=True)]
        read = len(heads) * max(map(len, heads.values())) + len(own) * max(map(len, own))
        if all(heads.values()) and 2 * read <= len(rows) * max(map(len, rows)):
            places = {prompt: place for place, prompt in enumerate(heads)}
            of = torch.tensor([places[request.prompt] for request in requests], device=device)
            head_ids, head_mask = fill(list(heads.values()))
            own_ids, own_mask = fill(own)
            ids = torch.cat([head_ids[of], own_ids], dim=1)
            cache = self._generate(head_ids, head_mask, decoding, 1).past_key_values
            longest = ids.shape[1] + decoding.max_new_tokens
            if isinstance(cache, Cache) and all(_masks_padding(layer, longest) for layer in cache.layers):
                cache.reorder_cache(cast(Any, of))
                return ids, torch.cat([head_mask[of], own_mask], dim=1), cache
            self._reads_once = False
        return (*fill(rows), None)

    def _generate(
        self, ids: Tensor, mask: Tensor, decoding: Decoding, steps: int,
        sampler: RowSampler | None = None, cache: Cache | None = None,
    ) -> Any:  # fmt: skip
        settings = decoding.generation_config(steps)
        hooks: dict[str, Any] = {} if sampler is None else {"logits_processor": LogitsProcessorList([sampler])}
        if cache is not None:
            hooks["past_key_values"] = cache
        with only_these_settings(self._model, settings), torch.inference_mode():
            return cast(Any, self._model).generate(
                input_ids=ids, attention_mask=mask, generation_config=settings, **hooks
            )


def _head(rows: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What some prompts begin with; each has a token of its own after it."""
    return rows[0][: min(shared_length(*rows), *(len(row) - 1 for row in rows))]


def generate_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[GenerationRequest],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    window: int = 2**30,
    sampling: Sampling | None = None,
    processes: Processes = ALONE,
    finished: Iterable[GenerationRecord] = (),
    keep: Callable[[Sequence[GenerationRecord]], None] | None = None,
    progress: Progress | None = None,
) -> list[GenerationRecord]:
    """Answers every request, greedily or by sampling words; one record per request, in order.

    Args:
        model: In evaluation mode, on any device or spread over several.
        tokenizer: Of the model.
        requests: In any order.
        stop_ids: As of ``Decoding``, with ``max_new_tokens``, ``window`` and ``sampling``.
        max_new_tokens: Longest reply.
        batch_size: Prompts at once; as of ``in_batches``, with ``processes``, ``keep`` and ``progress``.
        window: Most tokens that the model can read.
        sampling: None answers greedily.
        processes: Every process gets all records.
        finished: Replies of an interrupted run. Batches are cut as if they were not there, and a batch is left out
            where all of it is: so the replies are those of an uninterrupted run, bit for bit.
        keep: Called with the replies of each finished batch.
        progress: Called after each batch.

    Raises:
        EvaluationError: GPU memory runs out on a single prompt.
    """
    decoding = Decoding.of(tokenizer, stop_ids, max_new_tokens=max_new_tokens, window=window, sampling=sampling)
    writer = ReplyWriter(model)
    found = {record.id: record for record in finished}

    def answer(batch: list[int]) -> list[GenerationRecord]:
        asked = [requests[index] for index in batch]
        replies = writer.answer(asked, decoding)
        return [record_of_ids(request, ids, decoding, tokenizer) for request, ids in zip(asked, replies, strict=True)]

    return in_batches(
        [len(request.input_ids) for request in requests],
        answer,
        batch_size=batch_size,
        groups=[request.prompt for request in requests],
        processes=processes,
        finished={
            index: found[request.id]
            for index, request in enumerate(requests)
            if request.id in found and found[request.id].prefill == request.prefill
        },
        keep=keep,
        progress=progress,
    )


def record_of_ids(
    request: GenerationRequest, new_ids: list[int], decoding: Decoding, tokenizer: PreTrainedTokenizerBase
) -> GenerationRecord:
    """What was asked, with the reply that a model wrote."""
    end = next((position for position, token in enumerate(new_ids) if token in decoding.stop_ids), None)
    before = list(request.input_ids)
    # As it stands after the prompt: some tokenizers drop the space of a first token.
    whole, start = (decoded(ids, tokenizer) for ids in ([*before, *new_ids[:end]], before))
    reply = whole.removeprefix(start) if whole.startswith(start) else decoded(new_ids[:end], tokenizer)
    return GenerationRecord(
        **{name: value for name, value in vars(request).items() if name != "input_ids"},
        reply=reply if request.kind == "prefill" else reply.strip(),
        num_tokens=len(new_ids) if end is None else end,
        finished=end is not None,
    )
