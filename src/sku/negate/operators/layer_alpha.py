"""An alpha of its own for each layer or module: factors by name, on top of the recipe's alpha.

Layer-Aware Task Arithmetic (https://arxiv.org/abs/2502.20186, abstract read) gives layers different weights by their
alignment with instruction following; here the user says them, and ``learned`` finds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from sku.errors import RecipeError
from sku.negate.operators.base import Operated, Operator, OperatorContext, RowMap, map_rows, norms, scaling
from sku.negate.task_vector import TaskVector


@dataclass(frozen=True, kw_only=True)
class LayerAlphaSettings:
    """Which weights get which factor."""

    factors: Mapping[str, float]
    """Pattern of weight names, such as ``*.mlp.*`` or ``*.layers.[0-3].*``, -> factor. The first pattern that fits a
    name counts; 0 leaves its change out."""
    others: float = 1.0
    """Factor of the weights that no pattern fits."""

    def __post_init__(self) -> None:
        for name, factor in (*self.factors.items(), ("others", self.others)):
            if isinstance(factor, bool) or not isinstance(factor, int | float) or not abs(factor) < float("inf"):
                raise RecipeError(f"the factor of {name} is {factor!r}; it must be a finite number")


def _apply(settings: LayerAlphaSettings, vector: TaskVector, context: OperatorContext) -> Operated:
    maps: dict[str, RowMap] = {}
    used: dict[str, int] = dict.fromkeys(settings.factors, 0)
    for name in vector.deltas:
        pattern = next((pattern for pattern in settings.factors if fnmatchcase(name, pattern)), None)
        if pattern is not None:
            used[pattern] += 1
        maps[name] = scaling(float(settings.others if pattern is None else settings.factors[pattern]))
    idle = [pattern for pattern, count in used.items() if not count]
    if idle:
        raise RecipeError(
            f"layer_alpha: no changed weight is left for the pattern {idle[0]}; weights are named like "
            f"{next(iter(vector.deltas))}"
        )
    changed = map_rows(vector, maps, context.base)
    return Operated(
        vector=changed,
        row_maps=maps,
        record={
            "weights": used,
            "other_weights": len(vector.deltas) - sum(used.values()),
            **norms(vector, changed),
        },
    )


LAYER_ALPHA = Operator(
    name="layer_alpha",
    title="Alpha by layer",
    paper_url="https://arxiv.org/abs/2502.20186",
    settings=LayerAlphaSettings,
    apply=_apply,
)
