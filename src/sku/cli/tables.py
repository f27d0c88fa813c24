"""What was measured, as tables for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.table import Column, Table
from rich.text import Text

from sku.cli.console import is_verbose, plain_table, print_notes, results

if TYPE_CHECKING:
    from sku.attacks import AttackReport
    from sku.evaluate.comparison import Comparison
    from sku.report.tables import KeyFigure
    from sku.report.words import TableRow


def print_measured(comparison: Comparison, attacks: AttackReport | None) -> None:
    """The verdict, then what a reader looks at first; under ``--verbose`` all measures and notes."""
    from sku.report.tables import before_after_rows, key_figures, on_terminal

    print_verdict(comparison.verdict.line)
    results.print()
    if is_verbose():
        results.print(before_after_table(before_after_rows(comparison)))
        print_notes(comparison.notes)
    else:
        results.print(key_table(key_figures(comparison, on_terminal(comparison.rate))))
    if attacks is not None:
        print_attacks(attacks)


def key_table(figures: Iterable[KeyFigure]) -> Table:
    """Few figures, a line each."""
    table = plain_table((Column("", max_width=44),), ("base", "unlearned", "95 %"))
    for one in figures:
        table.add_row(one.label, one.before, one.after, one.bounds)
        if one.caution:
            table.add_row(Text(f"  {one.caution}", style="bold"))
    return table


def before_after_table(rows: Iterable[TableRow]) -> Table:
    """The comparison as a table for the terminal, a section for each kind of prompt."""
    # Names of sections are long and stand in the first column: they are wrapped, so that the figures fit 80 columns.
    table = plain_table((Column("", max_width=33),), ("base", "unlearned", "95 %"))
    table.collapse_padding = True
    table.add_column("goal", no_wrap=True)
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            table.add_row(Text(section, style="bold"))
        table.add_row(f"  {row.measure}", row.before, row.after, row.interval, row.wanted)
        if row.caution:
            table.add_row(Text(f"    {row.caution}", style="bold"))
    return table


def print_verdict(line: str) -> None:
    """What a comparison comes to, in one line: it stands before all else."""
    results.print(f"verdict   {line}")


def print_attacks(report: AttackReport) -> None:
    """The attacks as a table, that on the weights as another, and below them what could not be asked."""
    from sku.report.words import attack_rows, left_out_lines, relearn_rows

    table = plain_table(("harmful by attack", ""), ("unlearned", "95 %", "base", "gibberish"))
    shown = ""
    for attack, *cells in attack_rows(report):
        table.add_row("" if attack == shown else attack, *cells)
        shown = attack
    results.print()
    results.print(table)
    if rows := relearn_rows(report):
        figures = ("half at step", "rate", "harmful", "95 %", "ppl", "gibberish", "base")
        table = plain_table(("relearn",), figures, padding=(0, 0))
        for row in rows:
            table.add_row(*row)
        results.print()
        results.print(table)
    for line in left_out_lines(report):
        results.print(line)
