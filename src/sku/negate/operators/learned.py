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

A singular direction is ``s u v^T`` of the difference's singular value decomposition, so that a sum of scaled ones is a
linear map of the difference's rows, ``D V diag(c) V^T``, which an adapter can follow.

Shapes: O = outputs of a layer, I = its inputs, r = directions of one difference, C = scalars of all parts, N = answer
tokens, V = vocabulary.

Related: aTLAS (https://arxiv.org/abs/2407.02880, abstract read) learns coefficients of parameter blocks of task
vectors. The objective is our own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from sku.config.check import Count, NotNegative, Positive, validated
from sku.data.batches import PaddedRows
from sku.data.tokens import TokenizedExample
from sku.errors import RecipeError, TaskVectorError
from sku.losses import answer_nll, token_kl
from sku.negate.matching import unique_weights
from sku.negate.operators.base import (
    Need,
    Operated,
    Operator,
    OperatorContext,
    RowMap,
    group_of,
    scaling,
    turned_weights,
)
from sku.negate.operators.texts import answer_logits, batch_of, device_of, targets_of, with_first_tokens
from sku.negate.task_vector import TaskVector

SETS: Mapping[str, Need] = {
    "harmful": "harmful_held_out", "normal": "normal_held_out", "refusals": "refusals_held_out",
    "borderline": "borderline_held_out",
}  # fmt: skip
"""Name of a set -> its examples."""
FIGURES: Mapping[str, str] = {
    "harmful": "harmful_gain", "normal": "normal_kl", "refusals": "refusals_nll", "borderline": "borderline_kl",
}  # fmt: skip
"""Name of a set -> what the record says of it."""
_NO_MORE_THAN_ROUNDING = 1e-5
"""Of a difference's norm: what directions leave over below this is rounding, not a part of the difference."""
LearnedPer = Literal["layer", "module", "layer_and_module", "direction"]


@validated
class SetWeights:
    """What each set counts; 0 leaves it out."""

    harmful: NotNegative = 1.0
    refusals: NotNegative = 0.0
    normal: NotNegative = 10.0
    borderline: NotNegative = 0.0

    def __post_init__(self) -> None:
        if not self.harmful + self.refusals:
            raise RecipeError("weights of harmful and refusals are 0, so that all coefficients would fall to 0")
        if not self.normal + self.borderline:
            raise RecipeError("weights of normal and borderline are 0, so that nothing holds the coefficients back")


@validated
class LearnedSettings:
    """What is learned, and for how long."""

    per: LearnedPer = "layer"
    """What has one coefficient: the weights of a decoder layer, those of a kind of module, of a kind in one layer, or
    each singular direction of each weight's difference (thousands of coefficients: give it data enough)."""
    directions: Count = 16
    """For ``direction``: most directions of one weight; what they leave over has a coefficient of its own. A LoRA
    adapter's difference has as many as its rank."""
    steps: Count = 30
    learning_rate: Positive = 0.1
    batch_size: Count = 8
    """Examples of a step, of each set."""
    gain: Positive = 2.0
    """Nats a token by which the loss on harmful answers shall grow; 2 is a perplexity 7.4 times as high."""
    weights: SetWeights = field(default_factory=SetWeights)
    """Of the four sets."""
    answer_tokens: Count | None = None
    """First answer tokens that count, of all sets but the harmful one; empty for all."""
    start: float = 0.5
    """All coefficients at first."""
    largest: Positive = 8.0
    """Coefficients stay between 0 and this."""

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.largest:
            raise RecipeError(f"start is {self.start}; it must lie between 0 and largest, {self.largest}")


@dataclass(frozen=True, kw_only=True)
class ScaledParts:
    """One weight's difference as a sum of parts with a scalar each; both functions take the scalars of all weights."""

    count: int
    scaled: Callable[[Tensor], Tensor]
    """The difference with its parts scaled, differentiable in the scalars; the difference's own shape."""
    row_map: Callable[[Tensor], RowMap]
    """The same as a map of the difference's rows."""


def whole_difference(delta: Tensor, place: int) -> ScaledParts:
    """One part, all of it, with the scalar at a place: ``c D``."""
    return ScaledParts(
        count=1,
        scaled=lambda values_C: values_C[place] * delta,
        row_map=lambda values_C: scaling(float(values_C[place])),
    )


def singular_directions(delta: Tensor, directions: int, first: int, *, turned: bool) -> ScaledParts:
    """A difference's largest singular directions ``s u v^T``, and what they leave over unless it is rounding.

    Args:
        delta: ``[O, I]`` float32, or ``[I, O]`` if turned.
        directions: Most directions.
        first: Place of the first one's scalar; that of the rest R follows the last one's.
        turned: The weight is kept as ``[I, O]``.

    Returns:
        ``sum_i c_i s_i u_i v_i^T + c_rest R``, and as a map ``row V diag(c - c_rest) V^T + c_rest row``.
    """
    delta_OI = delta.T if turned else delta
    left, values, right = torch.linalg.svd(delta_OI, full_matrices=False)
    rank = max(1, min(directions, int((values > _NO_MORE_THAN_ROUNDING * values[0]).sum())))
    outputs_Or, inputs_Ir = left[:, :rank] * values[:rank], right[:rank].T.contiguous()
    rest_OI = delta_OI - outputs_Or @ inputs_Ir.T
    has_rest = bool(torch.linalg.norm(rest_OI) > _NO_MORE_THAN_ROUNDING * torch.linalg.norm(delta_OI))

    def scaled(values_C: Tensor) -> Tensor:
        changed_OI: Tensor = (outputs_Or * values_C[first : first + rank]) @ inputs_Ir.T
        if has_rest:
            changed_OI = changed_OI + values_C[first + rank] * rest_OI
        return changed_OI.T if turned else changed_OI

    def row_map(values_C: Tensor) -> RowMap:
        values_r, basis_Ir = values_C[first : first + rank].detach().cpu(), inputs_Ir.cpu()
        rest = float(values_C[first + rank]) if has_rest else 0.0
        after_Ir = basis_Ir * (values_r - rest)
        return lambda rows_RI: rows_RI @ basis_Ir @ after_Ir.T + rest * rows_RI

    return ScaledParts(count=rank + has_rest, scaled=scaled, row_map=row_map)


def _parts(
    settings: LearnedSettings, deltas: Mapping[str, Tensor], turned: set[str]
) -> tuple[dict[str, ScaledParts], list[str]]:
    """Weight name -> its parts; a name for each scalar: the group, or ``weight:place`` for directions."""
    parts: dict[str, ScaledParts] = {}
    if settings.per != "direction":
        groups = {name: group_of(name, settings.per) for name in deltas}
        names = list(dict.fromkeys(groups.values()))
        return {name: whole_difference(delta, names.index(groups[name])) for name, delta in deltas.items()}, names
    names = []
    for name, delta in deltas.items():
        if delta.ndim != 2 or not bool(delta.any()):
            parts[name] = whole_difference(delta, len(names))
            names.append(name)
        else:
            parts[name] = singular_directions(delta, settings.directions, len(names), turned=name in turned)
            names += [f"{name}:{number}" for number in range(parts[name].count)]
    return parts, names


def _apply(settings: LearnedSettings, vector: TaskVector, context: OperatorContext) -> Operated:
    device = device_of(context.base)
    deltas = {name: delta.to(device) for name, delta in vector.deltas.items()}
    parts, names = _parts(settings, deltas, turned_weights(context.base))
    sets = _sets(settings, context)
    values_C, measured = _learn(settings, parts, len(names), sets, context)
    record = {
        "sets": {name: len(examples) for name, examples in sets.items()},
        "coefficients": dict(zip(names, values_C.tolist(), strict=True)),
        "first": measured[0],
        "last": measured[-1],
    }
    return Operated(row_maps={name: part.row_map(values_C) for name, part in parts.items()}, record=record)


def _learn(
    settings: LearnedSettings,
    parts: Mapping[str, ScaledParts],
    count: int,
    sets: Mapping[str, Sequence[TokenizedExample]],
    context: OperatorContext,
) -> tuple[Tensor, list[dict[str, float]]]:
    """The coefficients ``[C]``, and what each step measured."""
    device = device_of(context.base)
    values_C = torch.full((count,), settings.start, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([values_C], lr=settings.learning_rate)
    weights = unique_weights(context.base)[0]
    generator = random.Random(context.seed)
    measured: list[dict[str, float]] = []
    for _ in range(settings.steps):
        batches = {
            name: batch_of(generator.sample(list(examples), min(settings.batch_size, len(examples))), device)
            for name, examples in sets.items()
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
    return values_C.detach(), measured


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


def _term(
    name: str, settings: LearnedSettings, batch: PaddedRows, context: OperatorContext, changed: Mapping[str, Tensor]
) -> tuple[Tensor, float]:
    """The term of a set, without its weight, and its figure for the record, both in nats a token."""
    after_NV = answer_logits(context.base, batch, changed)
    if name == "refusals":
        likely = answer_nll(after_NV, targets_of(batch)).mean()
        return likely, likely.item()
    with torch.no_grad():
        before_NV = answer_logits(context.base, batch)
    if name == "harmful":
        gain_N = answer_nll(after_NV, targets_of(batch)) - answer_nll(before_NV, targets_of(batch))
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
