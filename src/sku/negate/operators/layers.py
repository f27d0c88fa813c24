"""An alpha of its own for each layer or kind of module, on top of the recipe's alpha.

``D' = a D``, the factor a by the first key that names the weight: numbers of layers (``8-20``, ``0,3,8-20``), a
pattern of weight names (``*.mlp.*``), or ``rest`` for all others, such as those of no layer (embedding, last norm,
output head)::

    - layers: {8-20: 1.0, rest: 0}
    - layers: {0-7: 0.25, 8-20: 1.0, "*.mlp.*": 0.5, rest: 0}

Layer-Aware Task Arithmetic (https://arxiv.org/abs/2502.20186, abstract read) gives layers different weights by their
alignment with instruction following; here the user says them, and ``learned`` finds them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from sku.config.check import Finite, validated
from sku.errors import RecipeError
from sku.negate.operators.base import OTHERS, Operated, Operator, OperatorContext, RowMap, group_of, scaling
from sku.negate.task_vector import TaskVector

_REST = "rest"
_NUMBERS = re.compile(r"[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*")


@validated
class LayersSettings:
    """Which weights get which factor."""

    alphas: Mapping[str, Finite]
    """Key as above -> factor. The first key that names a weight counts; 0 leaves its change out."""

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


def _check(settings: LayersSettings, weights: Sequence[str]) -> None:
    """Refuses layers that a model doesn't have."""
    there = sorted({int(layer) for name in weights if (layer := group_of(name, "layer")) != OTHERS})
    for key in settings.alphas:
        for first, last in _spans(key) or ():
            missing = next((number for number in range(first, last + 1) if number not in there), None)
            if missing is not None:
                known = f"has layers {there[0]} to {there[-1]}" if there else "has no numbered layers"
                raise RecipeError(f"layers {key} names layer {missing}, and the model {known}")


def _apply(settings: LayersSettings, vector: TaskVector, context: OperatorContext) -> Operated:
    _check(settings, [name for name, _ in context.base.named_parameters()])
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
    apply=_apply,
    check=_check,
    only_setting="alphas",
)
