"""Rounding the weights: what a small change of the weights hid, coarse rounding can bring back.

Paper: arXiv 2410.16454 (Zhang et al., unlearning undone by quantization). Two schemes, each on a copy and both
simulated: the rounded weights are held in the model's own type, so that they run everywhere and differ from those of a
quantized kernel by no more than that type's rounding. Linear layers are rounded; embeddings, norms and the output head
stay as they are, as bitsandbytes leaves them.

Shapes: O = outputs of a layer, I = its inputs, B = blocks of 64 weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sku.attacks.base import Attack, AttackContext, WeightSetting
from sku.attacks.results import AttackCard

NF4_BLOCK = 64
"""Weights that share one scale."""
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of NF4, as listed in appendix E of arXiv 2305.14314: quantiles of the normal distribution, 0 exact."""

Rounding = Callable[[Tensor], Tensor]
"""Weights ``[O, I]`` float32 to the values that the scheme can hold."""


def int8_rounded(weight_OI: Tensor) -> Tensor:
    """Symmetric 8-bit integers with one scale for each output channel, rounded to nearest.

    ``scale_o = max_i |w_oi| / 127``, ``w' = scale_o * round(w / scale_o)``

    Args:
        weight_OI: ``[O, I]`` float32.

    Returns:
        ``[O, I]`` float32; a channel of zeros stays one.

    Source: vector-wise quantization of arXiv 2208.07339 (LLM.int8) on the weights alone, without its outlier columns.
    """
    scale_O1 = weight_OI.abs().amax(dim=1, keepdim=True) / 127
    scale_O1 = torch.where(scale_O1 == 0, torch.ones_like(scale_O1), scale_O1)
    return torch.round(weight_OI / scale_O1).clamp(-127, 127) * scale_O1


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
    blocks_B64 = nn.functional.pad(flat, (0, -flat.numel() % NF4_BLOCK)).reshape(-1, NF4_BLOCK)
    absmax_B1 = blocks_B64.abs().amax(dim=1, keepdim=True)
    code = torch.tensor(NF4_CODE, device=flat.device)
    scaled_B64 = blocks_B64 / torch.where(absmax_B1 == 0, torch.ones_like(absmax_B1), absmax_B1)
    nearest_B64 = torch.bucketize(scaled_B64, (code[1:] + code[:-1]) / 2)
    return (code[nearest_B64] * absmax_B1).reshape(-1)[: flat.numel()].reshape(weight_OI.shape)


def rounded_layers(model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    """The layers whose weights are rounded, by name: all linear ones but the output head.

    A weight that several layers share is listed once, and one that is tied to the embedding not at all.
    """
    heads = (model.get_input_embeddings(), model.get_output_embeddings())
    seen = {id(head.weight) for head in heads if head is not None}
    layers: dict[str, nn.Linear | Conv1D] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            layers[name] = module
    return layers


@contextmanager
def rounded_copy(model: PreTrainedModel, rounding: Rounding) -> Iterator[PreTrainedModel]:
    """A copy of a model with rounded weights.

    Args:
        model: It is not changed.
        rounding: The scheme.

    Yields:
        The copy.
    """
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for layer in rounded_layers(copied).values():
            # GPT-2 keeps its weights the other way round, inputs first.
            turned = isinstance(layer, Conv1D)
            weight_OI = layer.weight.T if turned else layer.weight
            weight_OI.copy_(rounding(weight_OI.float()))
    yield copied


def _settings_of(rounding: Rounding, scheme: str) -> Callable[[AttackContext], list[WeightSetting]]:
    def settings(context: AttackContext) -> list[WeightSetting]:
        weights = sum(layer.weight.numel() for layer in rounded_layers(context.model).values())
        return [
            WeightSetting(
                change=lambda model: rounded_copy(model, rounding),
                details={"scheme": scheme, "rounded_weights": weights, "weights": context.model.num_parameters()},
            )
        ]

    return settings


INT8 = Attack(
    card=AttackCard(
        name="int8",
        title="8-bit weights",
        kind="weights",
        changes="the weights of linear layers are rounded to 8-bit integers, one scale an output channel",
        source_url="https://arxiv.org/abs/2410.16454",
    ),
    settings=_settings_of(int8_rounded, "int8, symmetric, per output channel, round to nearest"),
)
NF4 = Attack(
    card=AttackCard(
        name="nf4-sim",
        title="4-bit weights",
        kind="weights",
        changes="the weights of linear layers are rounded to 4-bit NormalFloat in blocks of 64, simulated",
        source_url="https://arxiv.org/abs/2410.16454",
    ),
    settings=_settings_of(nf4_rounded, "NF4, blocks of 64, absmax scale"),
)
