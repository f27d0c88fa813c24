"""Decoder layers through torch.compile, one by one: short to compile, and nothing else of the model is touched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from sku.errors import RecipeError, did_you_mean
from sku.training.decoder_layers import decoder_layers


@contextmanager
def compiled_layers(model: PreTrainedModel, backend: str | None) -> Iterator[None]:
    """Compiles each decoder layer while the context lasts, for rows of any length.

    Args:
        model: Without adapter around it; adapters inside its layers are compiled with them.
        backend: Of ``torch.compile``, such as ``inductor``; None compiles nothing.

    Raises:
        ModelError: As ``decoder_layers``.
    """
    layers = [] if backend is None else list(decoder_layers(model)[1])
    for layer in layers:
        layer.compile(backend=backend, dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def check_compile_backend(backend: str | None) -> None:
    """Refuses a backend that torch doesn't have.

    Raises:
        RecipeError: With those there are.
    """
    if backend is None:
        return
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise RecipeError(
            f"compile_layers is {backend!r}, which torch doesn't know.{did_you_mean(backend, known)} Known: "
            f"{', '.join(known)}"
        )
