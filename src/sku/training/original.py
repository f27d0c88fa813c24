"""The original model inside the one in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from peft import PeftModel
from torch import nn


@contextmanager
def original_weights(model: nn.Module) -> Iterator[None]:
    """The frozen reference while the context lasts: adapter off and dropout off, as the original model is used.

    Args:
        model: Without wrappers around it; with an adapter, or with weights that no step has moved.
    """
    adapter_off: AbstractContextManager[None] = (
        model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
    )
    # Four-bit layers stay as they are: in evaluation mode bitsandbytes repacks their weights on a CPU for a kernel
    # that has no backward.
    switched = [module for module in model.modules() if module.training and not hasattr(module, "quant_state")]
    try:
        for module in switched:
            module.training = False
        with adapter_off:
            yield
    finally:
        for module in switched:
            module.training = True
