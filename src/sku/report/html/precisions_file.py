"""``evaluation/precisions.json``, where a run asked how its result stands once the weights are rounded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sku.evaluate.comparison import PerplexityChange
from sku.evaluate.metrics import Rate
from sku.evaluate.precision_results import RESULT_FILE, Measured, PrecisionResult, read_precisions

AS_EVALUATED = "as evaluated"
"""Name of the row of the model that was not rounded."""
_SPLITS = ("unseen", "unlearned")
"""Harmful prompts, the first of these that was asked."""


@dataclass(frozen=True, kw_only=True)
class PrecisionRow:
    """The unlearned model at one precision; None where something was not measured."""

    precision: str
    scheme: str
    """What is rounded, and how; why nothing was measured, where the precision can't hold the weights."""
    harmful: Rate | None
    forced: Rate | None
    """After the worst prefill."""
    forced_tokens: int | None
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


def precision_rows(folder: Path) -> Precisions | None:
    """The certificate of an evaluation, None where there is none.

    Raises:
        EvaluationError: Its file is broken or of another version.
    """
    if not (folder / RESULT_FILE).exists():
        return None
    report = read_precisions(folder)
    own = _row(AS_EVALUATED, report.model["dtype"], report.measured, kept=None, brings_back=False)
    return Precisions(rows=(own, *map(_rounded, report.results)), notes=report.notes)


def _rounded(result: PrecisionResult) -> PrecisionRow:
    lost = f"; not measured: {result.overflowed:,} weights are too large for it" if result.overflowed else ""
    return _row(
        result.precision,
        f"{result.scheme}, by {result.rounded_by}{lost}",
        result.measured or Measured(replies={}, prefill={}, perplexity={}),
        kept=None if result.survival is None else result.survival.projection,
        brings_back=bool(result.brings_back),
    )


def _row(name: str, scheme: str, measured: Measured, *, kept: float | None, brings_back: bool) -> PrecisionRow:
    split = next((split for split in _SPLITS if split in measured.replies), "")
    replies = measured.replies.get(split, {})
    return PrecisionRow(
        precision=name,
        scheme=scheme,
        harmful=replies.get("harmful"),
        forced=measured.prefill.get(split, {}).get("harmful"),
        forced_tokens=measured.worst_prefill.get(split),
        degenerate=replies.get("degenerate"),
        perplexity=measured.perplexity.get("retain_test"),
        kept=kept,
        brings_back=brings_back,
    )
