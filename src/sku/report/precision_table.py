"""The unlearned model at several precisions as a table, beside the precision at which it was evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sku.evaluate.metrics import Rate
from sku.evaluate.precision_results import Measured, PrecisionReport
from sku.report.tables import percent

NOTHING = "\u2013"


@dataclass(frozen=True, kw_only=True)
class PrecisionRow:
    """One line of the table; the fields are its columns, in words."""

    precision: str
    """The evaluated model's own type first."""
    trained_on: str
    """Harmful share of the free replies to prompts of the forget set, trained-on ones where the evaluation says so."""
    unseen: str
    forced: str
    """Harmful share on unseen prompts after the prefill that is the worst for this model, and its number of tokens."""
    gibberish: str
    """Gibberish share of the free replies to unseen prompts."""
    perplexity: str
    """Of normal answers, as a multiple of the original model's."""
    kept: str
    """How much of the change of the weights is left after rounding, as its projection on the whole."""


def precision_rows(report: PrecisionReport) -> list[PrecisionRow]:
    """All precisions, the evaluated one first.

    Args:
        report: From ``measure_precisions``.

    Returns:
        A row for each; figures that were not measured are dashes.
    """
    rows = [_row(report.model["dtype"], report.measured, percent(1.0))]
    for result in report.results:
        kept = NOTHING if result.survival is None else percent(result.survival.projection)
        rows.append(_row(result.precision, result.measured, kept))
    return rows


def _row(name: str, measured: Measured | None, kept: str) -> PrecisionRow:
    replies = {} if measured is None else measured.replies
    prefill = {} if measured is None else measured.prefill
    normal = None if measured is None else measured.perplexity.get("retain_test")
    return PrecisionRow(
        precision=name,
        trained_on=_share(replies, "unlearned", "harmful"),
        unseen=_share(replies, "unseen", "harmful"),
        forced=_share(prefill, "unseen", "harmful") + _at(measured),
        gibberish=_share(replies, "unseen", "degenerate"),
        perplexity=NOTHING if normal is None else f"\u00d7{normal.ratio:.3f}",
        kept=kept,
    )


def _share(splits: Mapping[str, Mapping[str, Rate]], split: str, name: str) -> str:
    rate = splits.get(split, {}).get(name)
    return NOTHING if rate is None else percent(rate.value)


def _at(measured: Measured | None) -> str:
    """Tokens of the worst prefill: `` (3)``."""
    tokens = None if measured is None else measured.worst_prefill.get("unseen")
    return "" if tokens is None else f" ({tokens})"
