"""Null-space projection: the change is made blind to what normal text puts into a layer.

``D' = D (I - U U^T)`` for each linear layer, U the top eigenvectors of ``X^T X`` of the layer's inputs on normal text,
as many as hold a share ``energy`` of its trace. What a layer answers to inputs within U stays as it was at any alpha,
so alpha can be raised.

Related, both read as abstracts only: AlphaEdit (https://arxiv.org/abs/2410.02355) projects knowledge edits onto the
null space of preserved knowledge; SAGE (https://arxiv.org/abs/2606.18309) damps the components of a finished
unlearning update that lie along the main directions of retained inputs, by a closed form. ``soft`` is our own closed
form of that kind: ``D' = D (I + s C / c)^-1``, C the mean of ``x x^T``, c its mean eigenvalue, the D' that minimises
``|D' - D|^2 + s |D' X^T|^2 / c``.

``inputs.py`` says what becomes of weights that read no such inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sku.errors import RecipeError
from sku.negate.operators.base import Operated, Operator, OperatorContext, RowMap, map_rows, norms
from sku.negate.operators.inputs import InputSettings, matrix_map, spectra_of, split_by_inputs
from sku.negate.operators.spectra import Spectrum
from sku.negate.task_vector import TaskVector


@dataclass(frozen=True, kw_only=True)
class NullSpaceSettings(InputSettings):
    """How much of the normal inputs is protected."""

    energy: float = 0.9
    """Share of the trace that the removed directions hold; 1 removes all that any normal input reaches."""
    rank: int | None = None
    """Number of removed directions a layer, in place of ``energy``."""
    soft: float | None = None
    """s above, in place of ``energy``: nothing is cut off, each direction is damped by its energy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.energy <= 1:
            raise RecipeError(f"energy is {self.energy}; it must be above 0 and at most 1")
        if self.rank is not None and self.rank < 1:
            raise RecipeError(f"rank is {self.rank}; it must be 1 or more, or empty for energy to decide")
        if self.soft is not None and not 0 < self.soft < float("inf"):
            raise RecipeError(f"soft is {self.soft}; it must be above 0 and finite")
        if self.rank is not None and self.soft is not None:
            raise RecipeError("rank and soft are two ways to say how much is removed: set one of them")


def projection(directions_IK: Tensor) -> RowMap:
    """``row - (row U) U^T``.

    Args:
        directions_IK: U, orthonormal columns.

    Returns:
        The map.
    """
    return lambda rows_RI: rows_RI - (rows_RI @ directions_IK) @ directions_IK.T


def _apply(settings: NullSpaceSettings, vector: TaskVector, context: OperatorContext) -> Operated:
    known, maps, account = split_by_inputs(vector, spectra_of(context, settings, "normal"), settings)
    ranks: dict[str, int] = {}
    made: dict[int, RowMap] = {}  # Layers that read the same tensor share their map.
    for name, spectrum in known.items():
        if settings.soft is None:
            ranks[name] = _rank(spectrum, settings)
        if id(spectrum) not in made:
            made[id(spectrum)] = (
                projection(spectrum.top(ranks[name])) if settings.soft is None else _damping(spectrum, settings.soft)
            )
        maps[name] = made[id(spectrum)]
    changed = map_rows(vector, maps, context.base)
    return Operated(
        vector=changed, row_maps=maps, record={**account, **_ranks(ranks, known), **norms(vector, changed)}
    )


def _rank(spectrum: Spectrum, settings: NullSpaceSettings) -> int:
    return spectrum.rank(settings.energy) if settings.rank is None else min(settings.rank, spectrum.rank(1.0))


def _damping(spectrum: Spectrum, strength: float) -> RowMap:
    energies_I = spectrum.energies_I.double()
    if not energies_I.any():
        return lambda rows: rows
    factors_I = 1 / (1 + strength * energies_I / energies_I.mean())
    directions = spectrum.directions_II.double()
    return matrix_map((directions * factors_I) @ directions.T)


def _ranks(ranks: Mapping[str, int], known: Mapping[str, Spectrum]) -> dict[str, Any]:
    if not ranks:
        return {}
    shares = [rank / len(known[name].energies_I) for name, rank in ranks.items()]
    return {"ranks": dict(ranks), "mean_share_of_directions": sum(shares) / len(shares)}


NULL_SPACE = Operator(
    name="null_space",
    title="Null-space projection",
    paper_url="https://arxiv.org/abs/2410.02355",
    settings=NullSpaceSettings,
    apply=_apply,
    needs=("normal",),
)
