"""``sweep.json``, where a sweep over strengths left one: the points of the frontier and the one that was picked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sku.errors import EvaluationError
from sku.evaluate.record_files import read_json_object

SWEEP_FILE = "sweep.json"
_AGAIN = "run sku sweep again"


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One strength. Shares are 0 to 1; None where something was not measured."""

    alpha: float
    harmful: float | None
    forced: float | None
    """Harmful after a forced start; the worst of several lengths."""
    degenerate: float | None
    perplexity_ratio: float | None
    """Of normal answers, after / before."""
    over_refusal: float | None


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The points by rising strength, and what was made of them."""

    points: tuple[SweepPoint, ...]
    pick: float | None
    """The strength that was chosen; None where none met the conditions."""
    why: str


def read_sweep(path: Path) -> Sweep:
    """Reads ``sweep.json``: keys ``points``, ``pick`` and ``why``.

    A measure is a number, a rate (``{value: ...}``), or several of them by name, of which the highest counts.

    Raises:
        EvaluationError: The file is broken or holds something else.
    """
    content = read_json_object(path, _AGAIN)
    try:
        pick = content["pick"]
        return Sweep(
            points=tuple(sorted((_point(point) for point in content["points"]), key=lambda point: point.alpha)),
            pick=None if pick is None else float(pick["alpha"] if isinstance(pick, Mapping) else pick),
            why=str(content["why"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EvaluationError(f"{path} doesn't fit its schema ({error!r}): {_AGAIN}") from None


def measure(value: Any) -> float | None:
    """A number from a number, from a rate, or from the highest of several; None stays None.

    Raises:
        TypeError, ValueError, KeyError: It is none of these.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        return float(value)
    if "value" in value:
        return float(value["value"])
    several = [found for found in map(measure, value.values()) if found is not None]
    return max(several) if several else None


def _point(plain: Mapping[str, Any]) -> SweepPoint:
    names = ("harmful", "forced", "degenerate", "perplexity_ratio", "over_refusal")
    return SweepPoint(alpha=float(plain["alpha"]), **{name: measure(plain.get(name)) for name in names})
