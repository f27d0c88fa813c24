"""``evaluation/precisions.json``, where a run asked how its result stands once the weights are rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sku.errors import EvaluationError
from sku.evaluate.comparison import PerplexityChange
from sku.evaluate.metrics import Rate
from sku.evaluate.record_files import check_schema, read_json_object

PRECISIONS_FILE = "precisions.json"
AS_EVALUATED = "as evaluated"
"""Name of the row of the model that was not rounded."""
_SCHEMA_VERSION = 1
_SPLITS = ("unseen", "unlearned")
"""Harmful prompts, the first of these that was asked."""
_AGAIN = "evaluate again"


@dataclass(frozen=True, kw_only=True)
class PrecisionRow:
    """The unlearned model at one precision; None where something was not measured."""

    precision: str
    scheme: str
    """What is rounded, and how; why nothing was measured, where the precision can't hold the weights."""
    harmful: Rate | None
    forced: Rate | None
    degenerate: Rate | None
    perplexity: PerplexityChange | None
    """Of normal answers, from the original model to this one."""
    kept: float | None
    """Length of the change that unlearning made, along itself, after rounding; 1 is all of it."""
    brings_back: bool
    """Whether harm is shown to be more than before rounding."""


@dataclass(frozen=True, kw_only=True)
class Precisions:
    """The model as it was evaluated, then at each precision."""

    rows: tuple[PrecisionRow, ...]
    notes: tuple[str, ...]


def read_precisions(path: Path) -> Precisions:
    """Reads ``precisions.json``.

    Raises:
        EvaluationError: The file is broken or of another version.
    """
    content = read_json_object(path, _AGAIN)
    check_schema(content, _SCHEMA_VERSION, str(path), _AGAIN)
    try:
        own = _row(AS_EVALUATED, str(content["model"]["dtype"]), content["measured"], kept=None, brings_back=False)
        return Precisions(
            rows=(own, *(_rounded(result) for result in content["results"])),
            notes=tuple(map(str, content["notes"])),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EvaluationError(f"{path} doesn't fit its schema ({error!r}): {_AGAIN}") from None


def _rounded(result: Mapping[str, Any]) -> PrecisionRow:
    survival = result["survival"]
    lost = f"; not measured: {result['overflowed']:,} weights are too large for it" if result["overflowed"] else ""
    return _row(
        str(result["precision"]),
        f"{result['scheme']}, by {result['rounded_by']}{lost}",
        result["measured"] or {"replies": {}, "prefill": {}, "perplexity": {}},
        kept=None if survival is None else float(survival["projection"]),
        brings_back=bool(result["brings_back"]),
    )


def _row(
    name: str, scheme: str, measured: Mapping[str, Any], *, kept: float | None, brings_back: bool
) -> PrecisionRow:
    replies = measured["replies"]
    split = next((split for split in _SPLITS if split in replies), "")
    perplexity = measured["perplexity"].get("retain_test")
    return PrecisionRow(
        precision=name,
        scheme=scheme,
        harmful=_rate(replies, split, "harmful"),
        forced=_rate(measured["prefill"], split, "harmful"),
        degenerate=_rate(replies, split, "degenerate"),
        perplexity=None if perplexity is None else PerplexityChange(**perplexity),
        kept=kept,
        brings_back=brings_back,
    )


def _rate(splits: Mapping[str, Any], split: str, name: str) -> Rate | None:
    plain = splits.get(split, {}).get(name)
    return None if plain is None else Rate(**plain)
