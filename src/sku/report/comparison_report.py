"""Everything that is written about a comparison, from its records alone: no model is needed to write it again."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from sku.errors import EvaluationError
from sku.report.method_overview import overview_figure
from sku.report.method_records import MethodRecord
from sku.report.method_statistics import Role
from sku.report.method_tables import comparison_rows, legend_line, markdown_comparison, markdown_differences
from sku.report.trade_off import trade_off_figure
from sku.storage import named_disk_errors, write_text

REFERENCE = "sku"
TABLE_FILE = "table.md"
OVERVIEW_STEM = "overview"
FIGURE_STEM = "trade_off"
_NOT_BRIEF = ("harmful_ungated_unseen", "gibberish_normal", "perplexity_harmful_unseen")
HEADINGS: dict[Role, str] = {
    "best": "At equal utility: each method at its best strength within the utility budget",
    "published": "As published: each method at its own strength",
}


def comparison_markdown(records: Sequence[MethodRecord], order: Sequence[str] | None = None) -> str:
    """All tables of a comparison.

    Args:
        records: Of all rows and seeds.
        order: Names of the rows in order; as in ``comparison_rows``.

    Returns:
        Markdown: for equal utility and for the methods as published, all measures, then the differences to SKU with
        their tests where SKU is among the rows and complete.

    Raises:
        EvaluationError: The records don't fit together.
    """
    has_reference = any(record.name == REFERENCE and record.status == "complete" for record in records)
    parts: list[str] = []
    for role, heading in HEADINGS.items():
        rows = comparison_rows(records, role, REFERENCE if has_reference else None, order)
        parts += [f"### {heading}\n", markdown_comparison(rows, legend_line(records, role))]
        if has_reference:
            parts.append(markdown_differences(records, role, REFERENCE, order))
    return "\n".join(parts)


def brief_markdown(records: Sequence[MethodRecord], order: Sequence[str] | None = None) -> str:
    """The main columns at equal utility, for a first page.

    Args:
        records: Of all rows and seeds.
        order: As in ``comparison_markdown``.

    Returns:
        A Markdown table with its legend.

    Raises:
        EvaluationError: The records don't fit together.
    """
    rows = comparison_rows(records, "best", None, order)
    brief = [
        dataclasses.replace(
            row,
            estimates={name: found for name, found in row.estimates.items() if name not in _NOT_BRIEF},
            utility_cost=None,
        )
        for row in rows
    ]
    return markdown_comparison(brief, legend_line(records, "best"))


def write_comparison(
    records: Sequence[MethodRecord], folder: Path, *, budget: float | None = None, order: Sequence[str] | None = None
) -> list[Path]:
    """Writes tables and pictures.

    Args:
        records: Of all rows and seeds.
        folder: Gets ``table.md``, and ``overview`` and ``trade_off`` as ``.png`` and ``.svg``.
        budget: Utility budget, drawn as a line in the trade-off.
        order: As in ``comparison_markdown``.

    Returns:
        The files written, in this order. The pictures are left out where no method has a complete record.

    Raises:
        EvaluationError: The records don't fit together.
        OutputError: The folder can't be written.
    """
    table = folder / TABLE_FILE
    with named_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(table, comparison_markdown(records, order))
    if not any(record.status == "complete" and not record.control for record in records):
        return [table]
    suffixes = ("png", "svg")
    return [
        table,
        *(overview_figure(records, folder / f"{OVERVIEW_STEM}.{suffix}", order=order) for suffix in suffixes),
        *(
            trade_off_figure(records, folder / f"{FIGURE_STEM}.{suffix}", budget=budget, order=order)
            for suffix in suffixes
        ),
    ]


def replace_block(text: str, name: str, block: str, where: str = "the text") -> str:
    """Puts a block between ``<!-- results:NAME -->`` and ``<!-- end:NAME -->``.

    Args:
        text: Markdown with both marks, once each and in this order.
        name: Of the block.
        block: What shall stand between the marks.
        where: Name of the text, for messages.

    Returns:
        The text with the block in place of what was there.

    Raises:
        EvaluationError: The marks are missing, double or out of order.
    """
    start, end = f"<!-- results:{name} -->", f"<!-- end:{name} -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise EvaluationError(f"{where} must hold the lines {start} and {end}, once each and in this order")
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), flags=re.DOTALL)
    return pattern.sub(lambda _: f"{start}\n\n{block.strip()}\n\n{end}", text)
