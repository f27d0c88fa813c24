"""Where each row of a comparison stands in the trade-off picture: numbers only, nothing is drawn here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sku.errors import EvaluationError
from sku.report.method_points import NORMAL_KEY, Point
from sku.report.method_records import BASE, MethodRecord
from sku.report.method_statistics import Estimate, points_of, rate_of_points, ratio_of_points

CostAxis = Literal["perplexity", "exact"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """One strength of one row in one panel: value, low and high in the units of the axes."""

    x: tuple[float, float, float] | None
    """None for a control that is no model and so has no perplexity."""
    y: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One row in one panel."""

    title: str
    control: bool
    line: list[Place]
    """By strength."""
    published: Place | None
    best: Place | None

    @property
    def costs(self) -> list[float]:
        """On the x axis, of everything that is drawn."""
        places = (*self.line, self.published, self.best)
        return [place.x[0] for place in places if place is not None and place.x is not None]


def panels_of(rows: Sequence[Sequence[MethodRecord]], x: CostAxis, kinds: Sequence[str]) -> dict[str, list[Curve]]:
    """Curves of all rows for each kind of reply.

    Args:
        rows: The records of each row, in order of the seeds.
        x: What the cost is read from.
        kinds: ``reply``, ``prefill``.

    Returns:
        Kind -> a curve per row; a kind for which nothing can be placed is left out.

    Raises:
        EvaluationError: No base model to compare with, or nothing can be placed at all.
    """
    base = next((row[0] for row in map(complete_records, rows) if row and row[0].name == BASE), None)
    if x == "perplexity" and base is None:
        raise EvaluationError(f"no complete record is named {BASE}: perplexity ratios need one, or draw x='exact'")
    panels = {kind: [_curve(row, base, x, f"unseen/{kind}") for row in rows] for kind in kinds}
    panels = {kind: curves for kind, curves in panels.items() if any(curve.costs for curve in curves)}
    if not panels:
        raise EvaluationError(
            f"no complete record has a harmful rate ({', '.join(kinds)}) and {x} on normal prompts: nothing to draw"
        )
    return panels


def complete_records(row: Sequence[MethodRecord]) -> list[MethodRecord]:
    """Those that did not fail."""
    return [record for record in row if record.status == "complete"]


def _curve(row: Sequence[MethodRecord], base: MethodRecord | None, x: CostAxis, key: str) -> Curve:
    def place(points: Sequence[Point]) -> Place | None:
        harm = rate_of_points(points, key, "harmful")
        if x == "exact":
            cost = _scaled(rate_of_points(points, NORMAL_KEY, "exact_answer"), 100)
        else:
            cost = None if base is None else _scaled(ratio_of_points(points, base, "retain_test"), 1)
        scaled = _scaled(harm, 100)
        return None if scaled is None else Place(x=cost, y=scaled)

    swept = [
        {point.strength: point for point in record.points if not {"sweep", "published"}.isdisjoint(point.roles)}
        for record in complete_records(row)
    ]
    shared = sorted(set[float]().union(*swept).intersection(*swept))
    line = [place([strengths[strength] for strengths in swept]) for strength in shared]
    return Curve(
        title=row[0].title,
        control=row[0].control,
        line=[found for found in line if found is not None],
        published=place(points_of(row, "published")),
        best=None if row[0].control else place(points_of(row, "best")),
    )


def _scaled(estimate: Estimate | None, factor: float) -> tuple[float, float, float] | None:
    return None if estimate is None else (factor * estimate.value, factor * estimate.low, factor * estimate.high)
