"""Learned coefficients: one scalar for each layer, module or singular direction of the vector, found on data.

``theta_c = theta_o - sum_i c_i tau_i``, the parts tau_i of the vector by layer, module or direction. Adam moves the
c_i to minimise the sum over four sets, each with its weight w, of

    harmful:    ``w * mean over answer tokens of max(0, gain - (nll_c - nll_o))``
    refusals:   ``w * mean over answer tokens of nll_c``
    normal:     ``w * mean over answer tokens of KL(P_o || P_c)``
    borderline: the same.

The loss on harmful answers shall grow by ``gain`` nats a token, more is not rewarded (gibberish begins there); safe
answers to the same prompts shall be likely, which a vector can do that holds a good twin's refusals; harmless text
shall be predicted as before. With ``answer_tokens`` the last three are read on the first tokens of an answer alone:
there it is decided how to reply.

All sets are of validation splits, which stage 1 has not seen: harmful answers and refusals (the safe answers of the
data) are those of ``forget_validation``, which a recipe with this operator holds out; normal pairs those of
``retain_validation``; borderline ones those of each ``normal_validation:NAME``.

Related: aTLAS (https://arxiv.org/abs/2407.02880, abstract read) learns coefficients of parameter blocks of task
vectors. The objective is our own.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from sku.data.tokens import TokenizedExample
from sku.errors import RecipeError, TaskVectorError
from sku.losses import answer_nll, token_kl
from sku.negate.operators.base import Need, Operated, Operator, OperatorContext, map_rows, norms, turned_weights
from sku.negate.operators.scaled_parts import ScaledParts, parts_by_direction, parts_by_group
from sku.negate.operators.texts import Batch, answer_logits, batch_of, device_of, with_first_tokens
from sku.negate.task_vector import TaskVector, unique_weights

OTHERS = "others"
"""Group of the weights of no layer."""
SETS: Mapping[str, Need] = {
    "harmful": "harmful_held_out", "normal": "normal_held_out", "refusals": "refusals_held_out",
    "borderline": "borderline_held_out",
}  # fmt: skip
"""Name of a set -> its examples."""
FIGURES: Mapping[str, str] = {
    "harmful": "harmful_gain", "normal": "normal_kl", "refusals": "refusals_nll", "borderline": "borderline_kl",
}  # fmt: skip
"""Name of a set -> what the record says of it."""
LearnedPer = Literal["layer", "module", "layer_and_module", "direction"]
GroupedBy = Literal["layer", "module", "layer_and_module"]


@dataclass(frozen=True, kw_only=True)
class SetWeights:
    """What each set counts; 0 leaves it out."""

    harmful: float = 1.0
    refusals: float = 0.0
    normal: float = 10.0
    borderline: float = 0.0

    def __post_init__(self) -> None:
        for name in ("harmful", "refusals", "normal", "borderline"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise RecipeError(f"weights.{name} is {getattr(self, name)}; it must be 0 or more and finite")
        if not self.harmful + self.refusals:
            raise RecipeError("weights of harmful and refusals are 0, so that all coefficients would fall to 0")
        if not self.normal + self.borderline:
            raise RecipeError("weights of normal and borderline are 0, so that nothing holds the coefficients back")


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
    """Examples of a step, of each set."""
    gain: float = 2.0
    """Nats a token by which the loss on harmful answers shall grow; 2 is a perplexity 7.4 times as high."""
    weights: SetWeights = field(default_factory=SetWeights)
    """Of the four sets."""
    answer_tokens: int | None = None
    """First answer tokens that count, of all sets but the harmful one; empty for all."""
    start: float = 0.5
    """All coefficients at first."""
    largest: float = 8.0
    """Coefficients stay between 0 and this."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "directions"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.answer_tokens is not None and self.answer_tokens < 1:
            raise RecipeError(f"answer_tokens is {self.answer_tokens}; it must be 1 or more, or empty for all")
        for name in ("learning_rate", "gain", "largest"):
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
        return OTHERS
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
    sets = {name: len(examples) for name, examples in _sets(settings, context).items()}
    record = {"sets": sets, "coefficients": coefficients, "first": first, "last": last, **norms(vector, changed)}
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
    sets = _sets(settings, context)
    measured: list[dict[str, float]] = []
    for _ in range(settings.steps):
        batches = {
            name: batch_of(_some(examples, settings.batch_size, generator), device) for name, examples in sets.items()
        }
        changed = {
            name: (weights[name].detach().float() - part.scaled(values_C)).to(weights[name].dtype)
            for name, part in parts.items()
        }
        terms: dict[str, Tensor] = {}
        figures: dict[str, float] = {}
        for name, batch in batches.items():
            terms[name], figures[FIGURES[name]] = _term(name, settings, batch, context, changed)
        loss = torch.stack([getattr(settings.weights, name) * term for name, term in terms.items()]).sum()
        if not torch.isfinite(loss):
            raise TaskVectorError("learned: the loss is NaN or infinite; lower its start")
        measured.append({"loss": loss.item(), **figures})
        optimizer.zero_grad()
        (values_C.grad,) = torch.autograd.grad(loss, [values_C])
        optimizer.step()
        with torch.no_grad():
            values_C.clamp_(0.0, settings.largest)
    return values_C.detach(), measured[0], measured[-1]


def _needs(settings: LearnedSettings) -> tuple[Need, ...]:
    return tuple(need for name, need in SETS.items() if getattr(settings.weights, name))


def _sets(settings: LearnedSettings, context: OperatorContext) -> dict[str, Sequence[TokenizedExample]]:
    """The sets that count, cut to the tokens that count."""
    found: dict[str, Sequence[TokenizedExample]] = {}
    for name, need in SETS.items():
        if getattr(settings.weights, name):
            examples = getattr(context, need)
            whole = name == "harmful" or settings.answer_tokens is None
            found[name] = examples if whole else with_first_tokens(examples, settings.answer_tokens or 0)
    return found


def _some(examples: Sequence[TokenizedExample], count: int, generator: random.Random) -> list[TokenizedExample]:
    return generator.sample(list(examples), min(count, len(examples)))


def _term(
    name: str, settings: LearnedSettings, batch: Batch, context: OperatorContext, changed: Mapping[str, Tensor]
) -> tuple[Tensor, float]:
    """The term of a set, without its weight, and its figure for the record, both in nats a token."""
    after_NV = answer_logits(context.base, batch, changed)
    if name == "refusals":
        likely = answer_nll(after_NV, batch.targets_N).mean()
        return likely, likely.item()
    with torch.no_grad():
        before_NV = answer_logits(context.base, batch)
    if name == "harmful":
        gain_N = answer_nll(after_NV, batch.targets_N) - answer_nll(before_NV, batch.targets_N)
        return functional.relu(settings.gain - gain_N).mean(), gain_N.mean().item()
    divergence = token_kl(before_NV, after_NV).mean()
    return divergence, divergence.item()


LEARNED = Operator(
    name="learned",
    title="Learned coefficients",
    paper_url="https://arxiv.org/abs/2407.02880",
    settings=LearnedSettings,
    apply=_apply,
    more_needs=_needs,
)
