"""Contexts: a tiny random model with invented token ids, normal and harmful ones from different ranges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from conftest import ModelMaker
from sku.data.tokenization import TokenizedExample
from sku.negate.operators.base import OperatorContext

ContextMaker = Callable[..., OperatorContext]


def example(ids: tuple[int, ...], answer_start: int) -> TokenizedExample:
    labels = tuple([-100] * answer_start + list(ids[answer_start:]))
    return TokenizedExample(input_ids=ids, labels=labels, answer_start=answer_start)


def examples(count: int, low: int, high: int, *, seed: int, length: int = 7) -> tuple[TokenizedExample, ...]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(low, high, (count, length), generator=generator).tolist()
    # Lengths differ, so that batches hold padding.
    return tuple(example(tuple(row[: length - place % 3]), 3) for place, row in enumerate(rows))


@pytest.fixture(scope="session")
def make_context(make_model: ModelMaker) -> ContextMaker:
    def make(base: Any = None, **changes: Any) -> OperatorContext:
        fields: dict[str, Any] = {
            "base": make_model() if base is None else base,
            "normal": examples(6, 10, 120, seed=1),
            "normal_held_out": examples(4, 10, 120, seed=2),
            "harmful": examples(6, 150, 300, seed=3),
            "batch_size": 4,
        }
        return OperatorContext(**{**fields, **changes})

    return make
