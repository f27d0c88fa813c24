"""Where a model keeps its decoder layers, and the modules inside them, whatever its architecture calls them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sku.errors import ModelError, RecipeError


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


def names_in_layers(model: PreTrainedModel, indices: Iterable[int], ends: Sequence[str], setting: str) -> list[str]:
    """Full names of the modules of some decoder layers whose names end in one of the given ways.

    Args:
        model: Without adapter.
        indices: Which layers, counted from 0.
        ends: Such as ``down_proj`` or ``mlp.c_proj``; whole parts of the name count.
        setting: Key of ``ends`` in the recipe, for the message.

    Returns:
        One name or more for each layer, in their order.

    Raises:
        RecipeError: A layer has no such module.
        ModelError: As ``decoder_layers``.
    """
    list_name, layers = decoder_layers(model)
    found: list[str] = []
    for index in indices:
        inner = [name for name, _ in layers[index].named_modules() if name]
        own = [name for name in inner if any(f".{name}".endswith(f".{end}") for end in ends)]
        if not own:
            raise RecipeError(
                f"{setting} is {', '.join(ends)}, but decoder layer {index} holds only {', '.join(inner)}; name the "
                "modules that are meant"
            )
        found += [f"{list_name}.{index}.{name}" for name in own]
    return found


def linear_names(model: PreTrainedModel, indices: Iterable[int]) -> list[str]:
    """Full names of the linear modules of some decoder layers.

    Args:
        model: Without adapter.
        indices: Which layers, counted from 0.

    Returns:
        In the order of the layers.

    Raises:
        ModelError: As ``decoder_layers``.
    """
    list_name, layers = decoder_layers(model)
    return [
        f"{list_name}.{index}.{name}"
        for index in indices
        for name, module in layers[index].named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
