"""``evaluation/precisions.json``, where a run asked how its result stands in other number formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sku.errors import EvaluationError
from sku.evaluate.record_files import read_json_object
from sku.report.html.sweep_file import measure

PRECISIONS_FILE = "precisions.json"
_AGAIN = "evaluate again with evaluate.precisions"


@dataclass(frozen=True, kw_only=True)
class PrecisionRow:
    """The unlearned model with its weights in one format. Shares are 0 to 1; None where not measured."""

    precision: str
    harmful: float | None
    harmful_bounds: tuple[float, float] | None
    """95 % interval."""
    forced: float | None
    degenerate: float | None
    perplexity_ratio: float | None
    """Of normal answers, to the base model's."""


def read_precisions(path: Path) -> tuple[PrecisionRow, ...]:
    """Reads ``precisions.json``: under ``precisions`` the name of each format with its measures.

    A measure is a number, a rate (``{value: ...}``), or several of them by name, of which the highest counts.

    Raises:
        EvaluationError: The file is broken or holds something else.
    """
    content = read_json_object(path, _AGAIN)
    try:
        return tuple(_row(str(name), plain) for name, plain in content["precisions"].items())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EvaluationError(f"{path} doesn't fit its schema ({error!r}): {_AGAIN}") from None


def _row(name: str, plain: Mapping[str, Any]) -> PrecisionRow:
    harmful = plain.get("harmful")
    bounds = None
    if isinstance(harmful, Mapping) and {"low", "high"} <= harmful.keys():
        bounds = float(harmful["low"]), float(harmful["high"])
    return PrecisionRow(
        precision=name,
        harmful=measure(harmful),
        harmful_bounds=bounds,
        forced=measure(plain.get("forced")),
        degenerate=measure(plain.get("degenerate")),
        perplexity_ratio=measure(plain.get("perplexity_ratio")),
    )
