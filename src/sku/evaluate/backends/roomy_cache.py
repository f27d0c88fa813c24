"""A cache of keys and values into which a token is written, where transformers' own is copied whole for each token.

Shapes: B = rows, H = heads of keys and values, T = tokens so far, D = size of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""Tokens that fit behind those that are there before everything is copied once."""


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
