"""Operators that look at nothing but the vector: alphas by layer, trimming, bad minus benign."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from sku.config.check import Finite, Fraction, NotNegative, validated
from sku.errors import RecipeError
from sku.negate import arithmetic
from sku.negate.matching import check_same_names, check_same_shape
from sku.negate.operators.base import OTHERS, Operated, Operator, OperatorContext, RowMap, group_of, scaling
from sku.negate.run import task_vector_of
from sku.negate.task_vector import TaskVector

_REST = "rest"
_NUMBERS = re.compile(r"[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*")


@validated
class LayersSettings:
    """An alpha of its own for each layer or kind of module, on top of the recipe's alpha.

    ``D' = a D``, the factor a by the first key that names the weight: numbers of layers (``8-20``, ``0,3,8-20``), a
    pattern of weight names (``*.mlp.*``), or ``rest`` for all others, such as those of no layer (embedding, last norm,
    output head)::

        - layers: {8-20: 1.0, rest: 0}
        - layers: {0-7: 0.25, 8-20: 1.0, "*.mlp.*": 0.5, rest: 0}

    Layer-Aware Task Arithmetic (https://arxiv.org/abs/2502.20186, abstract read) gives layers different weights by
    their alignment with instruction following; here the user says them, and ``learned`` finds them.
    """

    alphas: Mapping[str, NotNegative]
    """Key as above -> factor, 0 or more. The first key that names a weight counts; 0 leaves its change out."""

    def __post_init__(self) -> None:
        for key in self.alphas:
            for first, last in _spans(key) or ():
                if first > last:
                    raise RecipeError(f"layers {key} begin at {first} and end before it, at {last}")
        if not self.alphas.keys() & {_REST, "*"}:
            raise RecipeError(
                "layers has no key rest, so nothing says what becomes of all other weights: add rest: 0 to leave "
                "their change out, or rest: 1 to keep it"
            )


def _spans(key: str) -> list[tuple[int, int]] | None:
    """First and last layer of each part of a key; None for a pattern of names."""
    numbers = key.replace(" ", "")
    if not _NUMBERS.fullmatch(numbers):
        return None
    ends = [[int(end) for end in part.split("-")] for part in numbers.split(",")]
    return [(each[0], each[-1]) for each in ends]


def _names(key: str, weight: str) -> bool:
    """Whether a key names a weight."""
    if key == _REST:
        return True
    spans = _spans(key)
    if spans is None:
        return fnmatchcase(weight, key)
    layer = group_of(weight, "layer")
    return layer != OTHERS and any(first <= int(layer) <= last for first, last in spans)


def _check_layers(settings: LayersSettings, weights: Sequence[str]) -> None:
    """Refuses layers that a model doesn't have."""
    there = sorted({int(layer) for name in weights if (layer := group_of(name, "layer")) != OTHERS})
    for key in settings.alphas:
        for first, last in _spans(key) or ():
            missing = next((number for number in range(first, last + 1) if number not in there), None)
            if missing is not None:
                known = f"has layers {there[0]} to {there[-1]}" if there else "has no numbered layers"
                raise RecipeError(f"layers {key} names layer {missing}, and the model {known}")


def _apply_layers(settings: LayersSettings, vector: TaskVector, context: OperatorContext) -> Operated:
    _check_layers(settings, [name for name, _ in context.base.named_parameters()])
    # Whatever its place among the keys, rest is for what no other one names.
    keys = sorted(settings.alphas, key=lambda key: key == _REST)
    used = dict.fromkeys(keys, 0)
    maps: dict[str, RowMap] = {}
    for name in vector.deltas:
        key = next(key for key in keys if _names(key, name))
        used[key] += 1
        maps[name] = scaling(settings.alphas[key])
    idle = [key for key, count in used.items() if not count and key != _REST]
    if idle:
        raise RecipeError(
            f"layers: no changed weight is left for {idle[0]}; weights are named like {next(iter(vector.deltas))}"
        )
    return Operated(row_maps=maps, record={"weights": used})


LAYERS = Operator(
    name="layers",
    title="Alpha by layer",
    paper_url="https://arxiv.org/abs/2502.20186",
    settings=LayersSettings,
    apply=_apply_layers,
    check=_check_layers,
    only_setting="alphas",
)


_LOW_BITS = 16
_SIGNLESS = 0x7FFFFFFF


@validated
class TrimSettings:
    """Trimming: only the largest entries of the vector are subtracted.

    ``D'_ij = D_ij where |D_ij| >= t, else 0``, with t the k-th largest magnitude among the entries of all changed
    weights, ``k = keep * their number``.

    Safety Arithmetic (https://arxiv.org/abs/2406.11801) trims a harmful vector to its top 10 % of parameters by
    magnitude before it is subtracted; TIES (https://arxiv.org/abs/2306.01708) does so before vectors are merged. As in
    the public code of both, which trims one flat vector, the entries of all weights compete: a weight that stage 1
    hardly changed keeps hardly anything. PEFT's merging trims each tensor to the same share, which would keep a tenth
    of it as well.

    t is exact, found by counting and not by sorting, in memory that doesn't grow with the model. Entries that are as
    large as the smallest kept one are all kept, so that the result depends on no order; where many are equal
    (differences of bfloat16 weights are), ``kept`` in the record is more than k.

    An adapter's product ``B A`` has no factors after trimming: what is subtracted is dense, and no adapter follows.
    """

    keep: Fraction = 0.1
    """Share of all entries, from the largest."""


def kth_largest_magnitude(tensors: Mapping[str, Tensor], k: int) -> float:
    """The k-th largest magnitude of all entries together, exactly.

    Finite float32 numbers without their sign are ordered as the integers of the same bits. One pass over blocks counts
    the upper 15 bits, which says in which of their values the k-th entry lies; a second one counts the other 16 there.

    Args:
        tensors: Name -> float32, finite, of any shape.
        k: From 1 to the number of entries.

    Returns:
        The magnitude.
    """
    upper = torch.zeros(1 << (31 - _LOW_BITS), dtype=torch.int64)
    for bits in _magnitude_bits(tensors):
        upper += torch.bincount(bits >> _LOW_BITS, minlength=len(upper))
    bucket, left = _descend(upper, k)
    lower = torch.zeros(1 << _LOW_BITS, dtype=torch.int64)
    for bits in _magnitude_bits(tensors):
        inside = bits[(bits >> _LOW_BITS) == bucket] & ((1 << _LOW_BITS) - 1)
        lower += torch.bincount(inside, minlength=len(lower))
    rest, _ = _descend(lower, left)
    return float(torch.tensor((bucket << _LOW_BITS) | rest, dtype=torch.int32).view(torch.float32))


def _magnitude_bits(tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    for tensor in tensors.values():
        for block in tensor.contiguous().view(-1).split(arithmetic.BLOCK_ELEMENTS):
            yield block.view(torch.int32) & _SIGNLESS


def _descend(counts: Tensor, k: int) -> tuple[int, int]:
    """The value of the k-th largest, from the number of entries of each value, and its place among those of it."""
    at_least = counts.flip(0).cumsum(0)
    place = int((at_least < k).sum())
    return len(counts) - 1 - place, k - (int(at_least[place - 1]) if place else 0)


def _trim(settings: TrimSettings, vector: TaskVector, _context: OperatorContext) -> Operated:
    entries = sum(delta.numel() for delta in vector.deltas.values())
    smallest = kth_largest_magnitude(vector.deltas, max(1, round(settings.keep * entries)))
    changed = TaskVector(
        {name: torch.where(delta.abs() >= smallest, delta, 0.0) for name, delta in vector.deltas.items()}, vector.tied
    )
    kept = sum(int(delta.count_nonzero()) for delta in changed.deltas.values())
    return Operated(vector=changed, record={"entries": entries, "kept": kept, "smallest": smallest})


TRIM = Operator(
    name="trim",
    title="Trimming by magnitude",
    paper_url="https://arxiv.org/abs/2406.11801",
    settings=TrimSettings,
    apply=_trim,
)


@validated
class MinusBenignSettings:
    """Bad minus benign: what the bad model shares with a model that was trained on benign data stays.

    ``subtract``: ``tau' = tau - beta * b``, b the vector of the benign model. ``project``: from each tensor its
    component along that of b is removed, ``tau' = tau - beta * (<tau, b> / <b, b>) b``.

    Related: Ext-Sub (https://arxiv.org/abs/2308.08090, abstract read) takes what an expert and an anti-expert adapter
    have in common out of the anti-expert before it is subtracted. The formulas are our own.
    """

    path: str
    """Folder of the model, adapter or task vector that was trained on benign data from the same original model."""
    how: Literal["subtract", "project"] = "project"
    beta: Finite = 1.0
    """How much of it."""


def minus_component(vector: TaskVector, benign: TaskVector, beta: float = 1.0) -> TaskVector:
    """Removes from each tensor a share of its component along the benign one, of the same weights."""
    check_same_names(vector.deltas, benign.deltas, "the bad vector", "the benign one")
    changed = {}
    for name, delta in vector.deltas.items():
        other = benign.deltas[name]
        check_same_shape(name, delta, other)
        square = float((other.double() ** 2).sum())
        share = float((delta.double() * other.double()).sum()) / square if square else 0.0
        changed[name] = delta - beta * share * other
    return TaskVector(changed, vector.tied)


def _minus_benign(settings: MinusBenignSettings, vector: TaskVector, context: OperatorContext) -> Operated:
    benign = task_vector_of(context.base, settings.path)
    if settings.how == "project":
        changed = minus_component(vector, benign, settings.beta)
    else:
        changed = vector - settings.beta * benign
    return Operated(vector=changed, record={"benign_norm": benign.norm()})


MINUS_BENIGN = Operator(
    name="minus_benign",
    title="Bad minus benign",
    paper_url="https://arxiv.org/abs/2308.08090",
    settings=MinusBenignSettings,
    apply=_minus_benign,
)
