"""Which model was it? A hash of what it computes, so that rows of another model are never taken for its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from sku.evaluate.generation import GenerationRequest
from sku.evaluate.records import Split
from sku.models import embedding_weight


def fingerprint(model: PreTrainedModel, probes: Sequence[Sequence[int]]) -> str:
    """A hash of what a model computes: the same weights, adapters and dtype on the same device give the same.

    Args:
        model: In evaluation mode.
        probes: Token ids of a few prompts; the scores behind each are hashed.

    Returns:
        SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256()
    device = embedding_weight(model).device
    for ids in probes:
        with torch.inference_mode():
            scores = model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0, -1]
        digest.update(scores.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def probes_of(requests: Sequence[GenerationRequest]) -> list[tuple[int, ...]]:
    """The first prompt of each split."""
    first: dict[Split, tuple[int, ...]] = {}
    for request in requests:
        first.setdefault(request.split, request.input_ids)
    return list(first.values())
