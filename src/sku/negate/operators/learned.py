"""Learned coefficients: one scalar for each layer, module or singular direction of the vector, found on data.

``theta_c = theta_o - sum_i c_i tau_i``, the parts tau_i of the vector by layer, module or direction. Adam moves the
c_i to minimise

    ``mean over harmful answer tokens of max(0, gain - (nll_c - nll_o)) + weight * mean over normal answer tokens of
    KL(P_o || P_c)``:

the loss on harmful answers shall grow by ``gain`` nats a token, more is not rewarded (gibberish begins there), and
normal text shall be predicted as before. Harmful pairs are those of ``unlearned``, normal ones those of
``retain_validation``, which stage 1 has not seen.

Related: aTLAS (https://arxiv.org/abs/2407.02880, abstract read) learns coefficients of parameter blocks of task
vectors. The objective is our own.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from sku.data.tokenization import TokenizedExample
from sku.errors import RecipeError, TaskVectorError
from sku.losses import answer_nll, token_kl
from sku.negate.operators.base import Operated, Operator, OperatorContext, map_rows, norms, turned_weights
from sku.negate.operators.scaled_parts import ScaledParts, parts_by_direction, parts_by_group
from sku.negate.operators.texts import Batch, answer_logits, batch_of, device_of
from sku.negate.task_vector import TaskVector, unique_weights

_OTHERS = "others"
LearnedPer = Literal["layer", "module", "layer_and_module", "direction"]
GroupedBy = Literal["layer", "module", "layer_and_module"]


@dataclass(frozen=True, kw_only=True)
class LearnedSettings:
    """What is learned, and for how long."""

    per: LearnedPer = "layer"
    """What has one coefficient: the weights of a decoder layer, those of a kind of module, of a kind in one layer, or
    each singular direction of each weight's difference (thousands of coefficients: give it data enough)."""
    directions: int = 16
    """For ``direction``: most directions of one weight; what they leave over has a coefficient of its own. A LoRA
    adapter's difference has as many as its rank."""
    steps: int = 30
    learning_rate: float = 0.1
    batch_size: int = 8
    """Harmful and normal examples of a step, each."""
    gain: float = 2.0
    """Nats a token by which the loss on harmful answers shall grow; 2 is a perplexity 7.4 times as high."""
    weight: float = 10.0
    """Cost of a nat of KL on normal text."""
    start: float = 0.5
    """All coefficients at first."""
    largest: float = 8.0
    """Coefficients stay between 0 and this."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "directions"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("learning_rate", "gain", "weight", "largest"):
            if not 0 < getattr(self, name) < float("inf"):
                raise RecipeError(f"{name} is {getattr(self, name)}; it must be above 0 and finite")
        if not 0 <= self.start <= self.largest:
            raise RecipeError(f"start is {self.start}; it must lie between 0 and largest, {self.largest}")


def group_of(name: str, per: GroupedBy) -> str:
    """The group of a weight.

    Args:
        name: ``model.layers.3.mlp.up_proj.weight``.
        per: What is grouped by.

    Returns:
        ``3``, ``mlp.up_proj`` or ``3.mlp.up_proj``; ``others`` for weights of no layer.
    """
    found = re.search(r"\.(\d+)\.(?!(?:weight|bias)$)(.+?)(?:\.(?:weight|bias))?$", name)
    if found is None:
        return _OTHERS
    layer, module = found.groups()
    return {"layer": layer, "module": module, "layer_and_module": f"{layer}.{module}"}[per]


def _apply(settings: LearnedSettings, vector: TaskVector, context: OperatorContext) -> Operated:
    device = device_of(context.base)
    deltas = {name: delta.to(device) for name, delta in vector.deltas.items()}
    if settings.per == "direction":
        parts, names = parts_by_direction(deltas, settings.directions, turned_weights(context.base))
    else:
        parts, names = parts_by_group(deltas, {name: group_of(name, settings.per) for name in deltas})
    values_C, first, last = _learn(settings, parts, len(names), context)
    maps = {name: part.row_map(values_C) for name, part in parts.items()}
    changed = map_rows(vector, maps, context.base)
    coefficients = dict(zip(names, values_C.tolist(), strict=True))
    record = {"coefficients": coefficients, "first": first, "last": last, **norms(vector, changed)}
    return Operated(vector=changed, row_maps=maps, record=record)


def _learn(
    settings: LearnedSettings, parts: Mapping[str, ScaledParts], count: int, context: OperatorContext
) -> tuple[Tensor, dict[str, float], dict[str, float]]:
    """The coefficients ``[C]``, and what the first and the last step measured."""
    device = device_of(context.base)
    values_C = torch.full((count,), settings.start, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([values_C], lr=settings.learning_rate)
    weights = unique_weights(context.base)[0]
    generator = random.Random(context.seed)
    measured: list[dict[str, float]] = []
    for _ in range(settings.steps):
        harmful, normal = (
            batch_of(_some(examples, settings.batch_size, generator), device)
            for examples in (context.harmful, context.normal_held_out)
        )
        changed = {
            name: (weights[name].detach().float() - part.scaled(values_C)).to(weights[name].dtype)
            for name, part in parts.items()
        }
        shortfall, gain = _shortfall(settings.gain, harmful, context, changed)
        divergence = _divergence(normal, context, changed)
        loss = shortfall + settings.weight * divergence
        if not torch.isfinite(loss):
            raise TaskVectorError("learned: the loss is NaN or infinite; lower its start")
        measured.append({"loss": loss.item(), "harmful_gain": gain.item(), "normal_kl": divergence.item()})
        optimizer.zero_grad()
        (values_C.grad,) = torch.autograd.grad(loss, [values_C])
        optimizer.step()
        with torch.no_grad():
            values_C.clamp_(0.0, settings.largest)
    return values_C.detach(), measured[0], measured[-1]


def _some(examples: Sequence[TokenizedExample], count: int, generator: random.Random) -> list[TokenizedExample]:
    return generator.sample(list(examples), min(count, len(examples)))


def _shortfall(
    wanted: float, batch: Batch, context: OperatorContext, changed: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """What is missing at the gain that is asked for, and the gain, nats a token."""
    with torch.no_grad():
        before_N = answer_nll(answer_logits(context.base, batch), batch.targets_N)
    gain_N = answer_nll(answer_logits(context.base, batch, changed), batch.targets_N) - before_N
    return functional.relu(wanted - gain_N).mean(), gain_N.mean().detach()


def _divergence(batch: Batch, context: OperatorContext, changed: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        reference_NV = answer_logits(context.base, batch)
    return token_kl(reference_NV, answer_logits(context.base, batch, changed)).mean()


LEARNED = Operator(
    name="learned",
    title="Learned coefficients",
    paper_url="https://arxiv.org/abs/2407.02880",
    settings=LearnedSettings,
    apply=_apply,
    needs=("harmful", "normal_held_out"),
)
