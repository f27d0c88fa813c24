"""A LoRA adapter that counts differently for some tokens: the same forward pass, another model for each kind of rows.

With ``h = W x + s_t * B A x`` for token t, rows that see only tokens of their own scale s are computed as by the model
``theta_o + s (theta_bad - theta_o)``: s = 1 is the model in training, s = -alpha the one that stage 2 makes of it.
Linear in the adapter, so nothing but plain LoRA on linear layers can be scaled so.

Shapes: R = rows (1 when packed), T = tokens, O = outputs of a layer.
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sku.errors import ModelError, RecipeError

_LINEAR = ("Linear", "Linear4bit", "Linear8bitLt")
"""PEFT's layers that call ``lora_B`` for each token; the last two are there only with bitsandbytes."""


class TokenScale:
    """Scales what the adapter of one model adds."""

    def __init__(self, model: PeftModel) -> None:
        """Scales nothing yet.

        Args:
            model: With plain LoRA, as ``token_scale`` makes sure.
        """
        self._model = model
        self._hooks: list[RemovableHandle] = []
        self._scale_RT1: Tensor | None = None

    def set(self, scale_RT1: Tensor) -> None:
        """From now on the adapter counts so, until ``remove``: activation checkpointing runs layers again later.

        Args:
            scale_RT1: ``[R, T, 1]`` or ``[R, 1, 1]``.
        """
        self._scale_RT1 = scale_RT1
        if not self._hooks:
            self._hooks = [half.register_forward_hook(self._scale) for half in _upper_halves(self._model)]

    def remove(self) -> None:
        """The adapter counts as it is."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _scale(self, module: nn.Module, _inputs: Any, added: Tensor) -> Tensor:
        """Some models (OPT) put the tokens of all rows behind each other before a layer: ``[R T, O]``."""
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
    """What reads normal rows at another point of the line through original and trained model.

    Args:
        model: In training, its adapter included.
        retain_at: The point; at 1 there is nothing to scale.

    Returns:
        None for 1.

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
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
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


def _upper_halves(model: PeftModel) -> list[nn.Module]:
    return [half for module in model.modules() if isinstance(module, LoraLayer) for half in module.lora_B.values()]
