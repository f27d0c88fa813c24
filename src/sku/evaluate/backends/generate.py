"""The plain backend: transformers' ``generate`` on a batch of prompts. The others are checked against it.

``generate`` computes a whole batch until its last reply ends. Here it is called for ``CHUNK`` tokens at a time, going
on from its own cache, and replies that ended leave batch and cache between two calls: they cost nothing more, and
those that stay get the tokens that they get without it. In the cache a token is written into tensors with room for
more, where transformers' own is copied whole for each token.

Shapes: B = rows, H = heads of keys and values, T = tokens so far, D = size of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from sku.evaluate.backends.base import Decoding, GenerationRequest, RowSampler, by_room, only_these_settings
from sku.evaluate.batching import pad
from sku.models import embedding_weight, plain_model

ROOM = 64
"""Tokens that fit after those that are there before everything is copied once."""


class RoomyLayer(DynamicLayer):
    """``DynamicLayer`` whose keys and values are the beginning of larger tensors."""

    def __init__(self, layer: DynamicLayer) -> None:
        """Takes over what a layer holds.

        Args:
            layer: Of one model layer, with at least one token.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype, self.device = layer.dtype, layer.device
        self.keys, self.values = layer.keys, layer.values
        self.is_initialized = True
        self._shown: tuple[Tensor, ...] = ()
        self._room: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds the keys and values of new tokens, ``[B, H, new, D]``.

        Returns:
            Those of all tokens, ``[B, H, T, D]``; views, which the next call doesn't change.
        """
        assert self.keys is not None
        assert self.values is not None
        begun = self.keys.shape[-2]
        end = begun + key_states.shape[-2]
        # Whoever selects rows or crops puts other tensors in the place of those shown last.
        if not self._shown or self.keys is not self._shown[0] or end > self._room[0].shape[-2]:
            self._room = tuple(_with_room(part, end + ROOM) for part in (self.keys, self.values))
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[..., begun:end, :] = new
        self.keys, self.values = self._shown = tuple(room[..., :end, :] for room in self._room)
        return self.keys, self.values


def give_room(cache: Cache) -> None:
    """Puts a ``RoomyLayer`` in the place of each plain layer; layers of another kind (sliding windows, states) stay.

    Args:
        cache: With a token or more, so that its layers are what the model needs.
    """
    for place, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.get_seq_length() > 0:
            cache.layers[place] = RoomyLayer(layer)


def _with_room(part_BHTD: Tensor, tokens: int) -> Tensor:
    *rows, begun, size = part_BHTD.shape
    room = part_BHTD.new_empty(*rows, tokens, size)
    room[..., :begun, :] = part_BHTD
    return room


CHUNK = 32
"""Tokens between two looks at which replies have ended."""


class GenerateBackend:
    """``generate`` with padding on the left, on any device or a model spread over several."""

    def __init__(self, model: PreTrainedModel, batch_size: int) -> None:
        """Takes a model in evaluation mode.

        Args:
            model: It is not changed.
            batch_size: Prompts at once.
        """
        self._model = model
        # What a cache of another name holds, as Mamba's, is left alone.
        self._drops_rows = "past_key_values" in inspect.signature(plain_model(model).forward).parameters
        self.at_once = batch_size

    def answer(self, requests: Sequence[GenerationRequest], decoding: Decoding) -> list[list[int]]:
        """As the protocol says."""
        if self._drops_rows:
            replies = self._replies(requests, decoding, CHUNK)
            if replies is not None:
                return replies
            self._drops_rows = False
        found: dict[int, list[int]] = {}
        for room, places in by_room(requests, decoding).items():
            whole = self._replies([requests[place] for place in places], decoding, room)
            found |= dict(zip(places, whole or (), strict=True))
        return [found[place] for place in range(len(requests))]

    def _replies(self, requests: Sequence[GenerationRequest], decoding: Decoding, size: int) -> list[list[int]] | None:
        """The replies, ``size`` tokens a call; None where that needs a cache that can leave rows out, and it can't."""
        device, sampling, sampler = embedding_weight(self._model).device, decoding.sampling, None
        ids, mask = pad([request.input_ids for request in requests], decoding.pad_id, left=True, device=device)
        if sampling is not None:
            sampler = RowSampler([sampling.row_seed(request.id) for request in requests], sampling, device)
        replies: list[list[int]] = [[] for _ in requests]
        rooms = [decoding.room_of(request) for request in requests]
        stops = set(decoding.stop_ids)
        rows, cache = list(range(len(requests))), None
        while rows:
            steps = min(size, *(rooms[row] - len(replies[row]) for row in rows))
            before = ids.shape[1]
            output = self._generate(ids, mask, decoding, steps, sampler, cache)
            cache, ids = output.past_key_values, output.sequences
            for row, new in zip(rows, ids[:, before:].tolist(), strict=True):
                replies[row] += new
            stay = [
                place
                for place, row in enumerate(rows)
                if len(replies[row]) < rooms[row] and stops.isdisjoint(replies[row][-(ids.shape[1] - before) :])
            ]
            if not stay:
                break
            if not isinstance(cache, Cache):
                return None
            give_room(cache)
            mask = torch.cat([mask, mask.new_ones(len(rows), ids.shape[1] - before)], dim=1)
            if len(stay) < len(rows):
                kept: Any = torch.tensor(stay, device=ids.device)
                # Selects rows as beam search does, which every kind of layer knows: attention and recurrent state.
                cache.reorder_cache(kept)
                ids, mask, rows = ids[kept], mask[kept], [rows[place] for place in stay]
                if sampler is not None:
                    sampler.keep(stay)
        return replies

    def _generate(
        self,
        ids: Tensor,
        mask: Tensor,
        decoding: Decoding,
        steps: int,
        sampler: RowSampler | None,
        cache: Cache | None = None,
    ) -> Any:
        settings = decoding.generation_config(steps)
        hooks: dict[str, Any] = {} if sampler is None else {"logits_processor": LogitsProcessorList([sampler])}
        if cache is not None:
            hooks["past_key_values"] = cache
        with only_these_settings(self._model, settings), torch.inference_mode():
            return cast(Any, self._model).generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                **hooks,
            )
