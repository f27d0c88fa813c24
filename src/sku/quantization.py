"""Rounding weights to what 16-bit, 8-bit and 4-bit formats can hold: of tensors, and of a copy of a model.

All are simulated: the rounded values are held in the model's own type, so that they run everywhere and differ from
those of a quantized kernel by no more than that type's rounding.

Shapes: O = outputs of a layer, I = its inputs, B = blocks of ``NF4_BLOCK`` weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sku.config.stages import Precision

Rounding = Callable[[Tensor], Tensor]
"""Weights ``[O, I]`` float32 (any shape for the 16-bit formats) to the nearest values that a format has."""

NF4_BLOCK = 64
"""Weights that share one scale."""
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of NF4, as listed in appendix E of arXiv 2305.14314: quantiles of the normal distribution, 0 exact."""
_INT8_LARGEST = 127


def int8_rounded(weight_OI: Tensor) -> Tensor:
    """Symmetric 8-bit integers with one scale for each output channel, rounded to nearest.

    ``scale_o = max_i |w_oi| / 127``, ``w' = scale_o * round(w / scale_o)``

    Args:
        weight_OI: ``[O, I]`` float32.

    Returns:
        ``[O, I]`` float32; a channel of zeros stays one.

    Source: vector-wise quantization of arXiv 2208.07339 (LLM.int8) on the weights alone, without its outlier columns.
    """
    scale_O1 = weight_OI.abs().amax(dim=1, keepdim=True) / _INT8_LARGEST
    steps_OI = torch.round(weight_OI / _nonzero(scale_O1)).clamp(-_INT8_LARGEST, _INT8_LARGEST)
    return steps_OI * scale_O1


def nf4_rounded(weight_OI: Tensor) -> Tensor:
    """4-bit NormalFloat: blocks of 64 weights, row by row, each scaled by its largest magnitude.

    ``w' = absmax_b * nearest(NF4_CODE, w / absmax_b)``

    Args:
        weight_OI: ``[O, I]`` float32. The last block may be short.

    Returns:
        ``[O, I]`` float32; a block of zeros stays one.

    Source: arXiv 2305.14314 (QLoRA), sections 2 and 3, without double quantization of the scales.
    """
    flat = weight_OI.reshape(-1)
    blocks_B64 = functional.pad(flat, (0, -flat.numel() % NF4_BLOCK)).reshape(-1, NF4_BLOCK)
    absmax_B1 = blocks_B64.abs().amax(dim=1, keepdim=True)
    code = torch.tensor(NF4_CODE, device=flat.device)
    borders = (code[1:] + code[:-1]) / 2
    nearest_B64 = code[torch.bucketize(blocks_B64 / _nonzero(absmax_B1), borders)]
    return (nearest_B64 * absmax_B1).reshape(-1)[: flat.numel()].reshape(weight_OI.shape)


@dataclass(frozen=True)
class Format:
    """A way to hold weights."""

    scheme: str
    """What is rounded, and how, in a line."""
    rounding: Rounding
    layers_only: bool
    """Whether linear layers alone are rounded (``rounded_layers``), as quantizers do, or all weights."""


def _through(dtype: torch.dtype) -> Rounding:
    return lambda weight: weight.to(dtype).float()


FORMATS: Mapping[Precision, Format] = {
    "bf16": Format("all weights in bfloat16, rounded to nearest", _through(torch.bfloat16), layers_only=False),
    "fp16": Format("all weights in float16, rounded to nearest", _through(torch.float16), layers_only=False),
    "int8": Format(
        "linear layers in 8-bit integers, symmetric, one scale an output channel, rounded to nearest",
        int8_rounded,
        layers_only=True,
    ),
    "nf4": Format(
        "linear layers in NF4, blocks of 64, one absolute maximum a block, rounded to nearest",
        nf4_rounded,
        layers_only=True,
    ),
}
"""All formats by name, from the finest to the coarsest."""


def rounded_layers(model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    """The layers whose weights 8-bit and 4-bit formats round, by name: all linear ones but the output head.

    Embeddings, norms and the output head stay as they are, as bitsandbytes leaves them. A weight that several layers
    share is listed once, and one that is tied to the embedding not at all.
    """
    heads = (model.get_input_embeddings(), model.get_output_embeddings())
    seen = {id(head.weight) for head in heads if head is not None}
    layers: dict[str, nn.Linear | Conv1D] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            layers[name] = module
    return layers


def rounded_copy(model: PreTrainedModel, form: Format) -> PreTrainedModel | None:
    """A copy of a model with rounded weights; None where the format can't hold a weight, which would be infinite.

    Args:
        model: It is not changed.
        form: Says what is rounded: linear layers alone, or all weights and stored floating-point buffers.
    """
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for weight in _weights(copied, layers_only=form.layers_only):
            before = weight.float()
            after = form.rounding(before).to(weight.dtype)
            if bool((torch.isinf(after) & torch.isfinite(before)).any()):
                return None
            weight.copy_(after)
    return copied


def _weights(model: PreTrainedModel, *, layers_only: bool) -> Iterator[Tensor]:
    """What is rounded, each once; a layer's weights as ``[O, I]``."""
    if layers_only:
        for layer in rounded_layers(model).values():
            # GPT-2 keeps its weights the other way round, inputs first.
            yield layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        return
    seen: set[int] = set()
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point() and id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)
