"""A model's decoder layers, whatever its architecture calls them, and modes of its modules and its adapter.

Shapes: R = rows and T = tokens of a padded batch, or T = tokens of a packed row, O = outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sku.errors import ModelError, RecipeError

_LINEAR = ("Linear", "Linear4bit", "Linear8bitLt")
"""PEFT's layers that call ``lora_B`` for each token; the last two are there only with bitsandbytes."""


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

    Raises:
        RecipeError: A layer has no such module.
        ModelError: As ``decoder_layers``.
    """
    list_name, layers = decoder_layers(model)
    found: list[str] = []
    for index in indices:
        inner = [name for name, _ in layers[index].named_modules() if name]
        own = [name for name in inner if f".{name}".endswith(tuple(f".{end}" for end in ends))]
        if not own:
            raise RecipeError(
                f"{setting} is {', '.join(ends)}, but decoder layer {index} holds only {', '.join(inner)}; name the "
                "modules that are meant"
            )
        found += [f"{list_name}.{index}.{name}" for name in own]
    return found


def linear_names(model: PreTrainedModel, indices: Iterable[int]) -> list[str]:
    """Full names of the linear modules of some decoder layers, counted from 0.

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


def train_only(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Freezes all but the weights of the modules of some full names.

    Raises:
        ModelError: The model has no module of such a name.
    """
    model.requires_grad_(requires_grad=False)
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise ModelError(f"the model has no module {name} to train")
        modules[name].requires_grad_(requires_grad=True)


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
    layers = lora_layers(model) if autocast else []
    plain = bool(layers) and not any(layer.lora_variant for layer in layers)
    with disable_input_dtype_casting(model, active=plain):
        yield


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """PEFT's LoRA layers of a model; none where it has no adapter or another."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def is_four_bit(module: nn.Module) -> bool:
    """Whether a module is a linear layer of bitsandbytes with 4-bit weights."""
    return hasattr(module, "quant_state")


class TokenScale:
    """A LoRA adapter that counts differently for some tokens: one forward pass, another model for each kind of rows.

    With ``h = W x + s_t * B A x`` for token t, rows that see only tokens of their own scale s are computed as by the
    model ``theta_o + s (theta_bad - theta_o)``: s = 1 is the model in training, s = -alpha the one that stage 2 makes
    of it. Linear in the adapter, so nothing but plain LoRA on linear layers can be scaled so.
    """

    def __init__(self, model: PeftModel) -> None:
        """Scales nothing yet; ``token_scale`` makes sure that the model has plain LoRA."""
        self._model = model
        self._hooks: list[RemovableHandle] = []
        self._scale_RT1: Tensor | None = None

    def set(self, scale_RT1: Tensor) -> None:
        """From now on the adapter counts so, until ``remove``: activation checkpointing runs layers again later.

        The scale is ``[R, T, 1]`` or ``[R, 1, 1]``.
        """
        self._scale_RT1 = scale_RT1
        if not self._hooks:
            upper_halves = (half for layer in lora_layers(self._model) for half in layer.lora_B.values())
            self._hooks = [half.register_forward_hook(self._scale) for half in upper_halves]

    def remove(self) -> None:
        """The adapter counts as it is."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _scale(self, module: nn.Module, _inputs: Any, added: Tensor) -> Tensor:
        """Some models (OPT) put the tokens of all rows after each other before a layer: ``[R T, O]``."""
        assert self._scale_RT1 is not None
        scale = self._scale_RT1
        if added.ndim == 2:
            tokens = len(added) // len(scale) if scale.shape[1] == 1 else scale.shape[1]
            scale = scale.expand(-1, tokens, 1).flatten(0, 1)
        if added.ndim != scale.ndim or len(scale) != len(added) or scale.shape[1] not in (1, added.shape[1]):
            raise ModelError(
                f"a layer of the adapter doesn't see the tokens of the batch ({tuple(added.shape)} for "
                f"{len(self._scale_RT1)} rows), so normal text can't be compared elsewhere: set preservation_at to 1"
            )
        return added * scale.to(added.dtype)


def token_scale(model: nn.Module, retain_at: float) -> TokenScale | None:
    """What reads normal rows at another point of the line through original and trained model; None for 1.

    Raises:
        RecipeError: The point can't be had with this model.
    """
    if retain_at == 1:
        return None
    reason = _why_not(model)
    if reason is not None:
        raise RecipeError(f"preservation_at is {retain_at:g}, which needs plain LoRA, and {reason}: set it to 1")
    assert isinstance(model, PeftModel)
    return TokenScale(model)


def _why_not(model: nn.Module) -> str | None:
    if not isinstance(model, PeftModel):
        return "all weights are trained"
    layers = lora_layers(model)
    if not layers:
        return "the adapter is another"
    if any(layer.lora_embedding_B for layer in layers):
        return "the adapter changes embeddings"
    if any(layer.lora_variant for layer in layers):
        return "the adapter is a variant that is not linear in what it adds"
    kinds = sorted({type(layer).__name__ for layer in layers} - set(_LINEAR))
    if kinds:
        return f"the adapter changes more than linear layers ({kinds[0]})"
    others = sorted(name for name, weight in model.named_parameters() if weight.requires_grad and "lora_" not in name)
    return f"{others[0]} is trained too" if others else None
