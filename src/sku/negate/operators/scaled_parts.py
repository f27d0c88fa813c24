"""A task vector as a sum of parts with a scalar each: what ``learned`` moves.

``tau = sum_i tau_i``; the parts are the differences of whole weights, or the singular directions of each. A direction
is ``s u v^T`` of the difference's singular value decomposition, so that a sum of scaled directions is a linear map of
the difference's rows, ``D V diag(c) V^T``, which an adapter can follow.

Shapes: O = outputs of a layer, I = its inputs, r = directions of one difference, C = scalars of all parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sku.negate.operators.base import RowMap, scaling

_NO_MORE_THAN_ROUNDING = 1e-5
"""Of a difference's norm: what directions leave over below this is rounding, not a part of the difference."""


class ScaledParts(Protocol):
    """The parts of one weight's difference."""

    def scaled(self, values_C: Tensor) -> Tensor:
        """The difference with its parts scaled, differentiable in ``values_C``; the difference's own shape."""

    def row_map(self, values_C: Tensor) -> RowMap:
        """The same as a map of the difference's rows."""


@dataclass(frozen=True, kw_only=True)
class WholeDifference:
    """One part: all of it."""

    delta: Tensor
    place: int
    """Of its scalar."""

    def scaled(self, values_C: Tensor) -> Tensor:
        """``c D``."""
        return values_C[self.place] * self.delta

    def row_map(self, values_C: Tensor) -> RowMap:
        """``c row``."""
        return scaling(float(values_C[self.place]))


@dataclass(frozen=True, kw_only=True)
class SingularDirections:
    """A part a direction, and one for what they leave over."""

    outputs_Or: Tensor
    """``s u`` in columns."""
    inputs_Ir: Tensor
    """``v`` in columns."""
    rest_OI: Tensor | None
    """What the directions leave over; None where that is rounding."""
    first: int
    """Place of the first direction's scalar; that of the rest follows the last direction's."""
    turned: bool
    """The weight is kept as ``[I, O]``."""

    def scaled(self, values_C: Tensor) -> Tensor:
        """``sum_i c_i s_i u_i v_i^T + c_rest R``."""
        rank = self.inputs_Ir.shape[1]
        values_r = values_C[self.first : self.first + rank]
        changed_OI = (self.outputs_Or * values_r) @ self.inputs_Ir.T
        if self.rest_OI is not None:
            changed_OI = changed_OI + values_C[self.first + rank] * self.rest_OI
        return changed_OI.T if self.turned else changed_OI

    def row_map(self, values_C: Tensor) -> RowMap:
        """``row V diag(c - c_rest) V^T + c_rest row``; nothing beyond the directions where they leave nothing over."""
        rank = self.inputs_Ir.shape[1]
        values_r = values_C[self.first : self.first + rank].detach().cpu()
        inputs_Ir = self.inputs_Ir.cpu()
        rest = 0.0 if self.rest_OI is None else float(values_C[self.first + rank])
        after_Ir = inputs_Ir * (values_r - rest)

        def mapped(rows_RI: Tensor) -> Tensor:
            return rows_RI @ inputs_Ir @ after_Ir.T + rest * rows_RI

        return mapped

    @property
    def scalars(self) -> int:
        """How many places this weight takes."""
        return self.inputs_Ir.shape[1] + (self.rest_OI is not None)


def singular_directions(delta: Tensor, directions: int, first: int, *, turned: bool) -> SingularDirections:
    """Splits a difference into its largest singular directions and the rest.

    Args:
        delta: ``[O, I]`` float32, or ``[I, O]`` if turned.
        directions: Most directions.
        first: Place of the first one's scalar.
        turned: The weight is kept as ``[I, O]``.

    Returns:
        The parts, on the difference's device.
    """
    delta_OI = delta.T if turned else delta
    left, values, right = torch.linalg.svd(delta_OI, full_matrices=False)
    rank = max(1, min(directions, int((values > _NO_MORE_THAN_ROUNDING * values[0]).sum())))
    outputs_Or, inputs_Ir = left[:, :rank] * values[:rank], right[:rank].T.contiguous()
    rest_OI: Tensor | None = delta_OI - outputs_Or @ inputs_Ir.T
    if torch.linalg.norm(rest_OI) <= _NO_MORE_THAN_ROUNDING * torch.linalg.norm(delta_OI):
        rest_OI = None
    return SingularDirections(
        outputs_Or=outputs_Or, inputs_Ir=inputs_Ir, rest_OI=rest_OI, first=first, turned=turned
    )  # fmt: skip


def parts_by_group(
    deltas: Mapping[str, Tensor], groups: Mapping[str, str]
) -> tuple[dict[str, ScaledParts], list[str]]:
    """Whole differences, those of a group with one scalar.

    Args:
        deltas: Weight name -> difference.
        groups: Weight name -> group.

    Returns:
        Weight name -> its parts; the groups in the order of their scalars.
    """
    names = list(dict.fromkeys(groups[name] for name in deltas))
    place = {group: number for number, group in enumerate(names)}
    return {name: WholeDifference(delta=delta, place=place[groups[name]]) for name, delta in deltas.items()}, names


def parts_by_direction(
    deltas: Mapping[str, Tensor], directions: int, turned: set[str]
) -> tuple[dict[str, ScaledParts], list[str]]:
    """A scalar for each of the largest singular directions of each matrix, and one for each difference that is none.

    Args:
        deltas: Weight name -> difference.
        directions: Most directions of one matrix.
        turned: Weights that are kept as ``[I, O]``.

    Returns:
        Weight name -> its parts; a name for each scalar, ``weight:place`` for directions.
    """
    parts: dict[str, ScaledParts] = {}
    names: list[str] = []
    for name, delta in deltas.items():
        if delta.ndim != 2 or not bool(delta.any()):
            parts[name] = WholeDifference(delta=delta, place=len(names))
            names.append(name)
            continue
        split = singular_directions(delta, directions, len(names), turned=name in turned)
        parts[name] = split
        names += [f"{name}:{number}" for number in range(split.scalars)]
    return parts, names
