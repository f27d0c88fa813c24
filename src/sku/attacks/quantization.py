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
from sku.quantization import int8_rounded, nf4_rounded

Rounding = Callable[[Tensor], Tensor]
"""Weights ``[O, I]`` float32 to the values that the scheme can hold."""


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
