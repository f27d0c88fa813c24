"""A model without weights: the real architecture, whose tensors have shapes and types but no content.

It lies on torch's ``meta`` device, so a model of any size takes no memory.
"""

from __future__ import annotations

import re
import warnings

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from sku.errors import ModelError, RecipeError, first_line, one_line

UNBUILT = (
    OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, ArithmeticError, re.error,
)  # fmt: skip
"""What transformers and PEFT raise for settings that make no model."""


def with_adapter(model: PreTrainedModel, adapter: PeftConfig) -> PeftModel:
    """A model without weights with an adapter added to it; PEFT holds adapters in float32 whatever the model's type.

    Raises:
        RecipeError: The adapter doesn't fit.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of transposed layers, which PEFT sets right.
            adapted = get_peft_model(model, adapter, low_cpu_mem_usage=True)
    except UNBUILT as error:
        raise RecipeError(f"the adapter can't be added: {one_line(error)}") from error
    assert isinstance(adapted, PeftModel)
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # PEFT leaves adapters that have no content yet in the model's type.
            parameter.data = parameter.data.float()
    return adapted


def without_weights(config: PreTrainedConfig, dtype: torch.dtype, name: str) -> PreTrainedModel:
    """The model of a configuration on the ``meta`` device: shapes and types, no content.

    Args:
        config: Of the model.
        dtype: Of its weights.
        name: For messages.

    Raises:
        ModelError: transformers has no such architecture, or the settings make no model.
    """
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # Of single architectures' internals, and of empty weights: refused below.
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except UNBUILT as error:
        raise ModelError(f"model {name} can't be built from its configuration: {first_line(error)}") from error
    empty = next((own for own, weight in model.named_parameters() if not weight.numel()), None)
    if empty is not None:
        raise ModelError(f"model {name} can't be built from its configuration: its weight {empty} is empty")
    assert isinstance(model, PreTrainedModel)
    return model
