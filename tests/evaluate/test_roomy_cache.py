"""The cache with room holds what transformers' own does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sku.evaluate.backends.roomy_cache import ROOM, RoomyLayer, give_room

ROWS, HEADS, SIZE = 4, 2, 3


def drawn(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(ROWS, HEADS, tokens, SIZE, generator=torch.Generator().manual_seed(seed))


def begun(first: Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.update(first, -first)
    return layer


def test_tokens_are_appended_bit_for_bit_also_beyond_the_room() -> None:
    first = drawn(5)
    plain, roomy = begun(first), RoomyLayer(begun(first))
    for number in range(2 * ROOM + 3):
        new = drawn(1, number)
        for mine, theirs in zip(roomy.update(new, -new), plain.update(new, -new), strict=True):
            assert torch.equal(mine, theirs)
    assert roomy.get_seq_length() == plain.get_seq_length() == 5 + 2 * ROOM + 3
    assert roomy.get_mask_sizes(1) == plain.get_mask_sizes(1)


def test_tokens_follow_the_rows_that_stay() -> None:
    first = drawn(5)
    plain, roomy = begun(first), RoomyLayer(begun(first))
    kept: Any = torch.tensor([2, 0])
    new = drawn(1, 1)
    for layer in (plain, roomy):
        layer.update(new, -new)
        layer.reorder_cache(kept)
        layer.update(new[kept], -new[kept])
        layer.crop(-1)
        layer.update(2 * new[kept], -new[kept])
    assert plain.keys is not None
    assert roomy.keys is not None
    assert torch.equal(roomy.keys, plain.keys)
    assert torch.equal(roomy.values, plain.values)  # type: ignore[arg-type]


def test_what_was_shown_is_not_written_over() -> None:
    roomy = RoomyLayer(begun(drawn(5)))
    new = drawn(1, 1)
    shown, _ = roomy.update(new, -new)
    copy = shown.clone()
    for _ in range(3):
        roomy.update(2 * new, -new)
    assert torch.equal(shown, copy)


def test_layers_of_another_kind_stay() -> None:
    cache = DynamicCache()
    cache.layers = [
        begun(drawn(2)),
        DynamicSlidingWindowLayer(sliding_window=4),
        DynamicLayer(),
    ]
    give_room(cache)
    assert [type(layer) for layer in cache.layers] == [RoomyLayer, DynamicSlidingWindowLayer, DynamicLayer]
    first = cache.layers[0]
    give_room(cache)
    assert cache.layers[0] is first
