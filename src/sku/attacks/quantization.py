"""Rounding the weights: what a small change of the weights hid, coarse rounding can bring back.

Paper: arXiv 2410.16454 (Zhang et al., unlearning undone by quantization). Two schemes, each on a copy of the model;
``sku.quantization`` says what is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from sku.attacks.base import Attack, AttackContext, WeightSetting
from sku.attacks.results import AttackCard
from sku.quantization import Rounding, int8_rounded, nf4_rounded, rounded_copy, rounded_layers


def _settings_of(rounding: Rounding, scheme: str) -> Callable[[AttackContext], list[WeightSetting]]:
    @contextmanager
    def changed(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        with rounded_copy(model, rounding) as (copied, _):
            yield copied

    def settings(context: AttackContext) -> list[WeightSetting]:
        weights = sum(layer.weight.numel() for layer in rounded_layers(context.model).values())
        return [
            WeightSetting(
                change=changed,
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
