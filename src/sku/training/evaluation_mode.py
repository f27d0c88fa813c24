"""Dropout off for a while, as the original model is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model's modules in evaluation mode and back afterwards.

    Args:
        model: Possibly wrapped for distributed training.
    """
    # Four-bit layers are in training mode meanwhile: else bitsandbytes repacks their weights on a CPU, for a kernel
    # that has no backward.
    switched = [module for module in model.modules() if module.training != is_four_bit(module)]
    try:
        for module in switched:
            module.training = not module.training
        yield
    finally:
        for module in switched:
            module.training = not module.training


def is_four_bit(module: nn.Module) -> bool:
    """Whether a module is a linear layer of bitsandbytes with 4-bit weights."""
    return hasattr(module, "quant_state")
