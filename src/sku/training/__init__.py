"""The one training loop of all methods, and what a method tells it.

Here: a model's decoder layers, whatever its architecture calls them, and modes of its modules and its adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from sku.errors import ModelError


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers: the outermost list that is as long as the configuration says.

    Raises:
        ModelError: There is none, or there are two side by side.
    """
    count = model.config.get_text_config().num_hidden_layers
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    # A layer can hold as many experts as there are layers.
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outermost) != 1:
        raise ModelError(
            f"the model's {count} decoder layers can't be told: module lists of that length are "
            f"{', '.join(outermost) or 'none'}"
        )
    return outermost[0], lists[outermost[0]]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off for a while: puts a model's modules, wrapped or not, in evaluation mode and back afterwards."""
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


@contextmanager
def adapter_inputs_as_they_are(model: nn.Module, *, autocast: bool) -> Iterator[None]:
    """What goes into plain LoRA layers keeps its type for a while, where autocast chooses that of the products.

    PEFT turns it into the adapter's float32 first, and autocast back again: the values are the same, and what each
    layer keeps for its backward pass is a copy of its own, where layers side by side could share one. PEFT's layers of
    four bits leave it alone under autocast too.

    Args:
        model: With or without an adapter; another than plain LoRA is left as it is.
        autocast: Whether it is on where the model is run meanwhile, backward passes with checkpoints included.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    plain = autocast and bool(layers) and not any(layer.lora_variant for layer in layers)
    with disable_input_dtype_casting(model, active=plain):
        yield


def is_four_bit(module: nn.Module) -> bool:
    """Whether a module is a linear layer of bitsandbytes with 4-bit weights."""
    return hasattr(module, "quant_state")
