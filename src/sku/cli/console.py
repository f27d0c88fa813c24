"""Printing: a console for results, one for errors, one for messages and progress bars."""

from __future__ import annotations

import json
import logging
import shlex
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from sku.attacks.results import AttackReport
    from sku.evaluate.comparison import Comparison
    from sku.evaluate.precision_results import PrecisionReport
    from sku.report.method_records import MethodRecord, Role
    from sku.report.method_statistics import Estimate
    from sku.report.tables import TableRow

_OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Categories of Unicode that a terminal may obey or can't be given: controls, formats, lone surrogates, line ends."""
_LONGEST_ERROR = 900
_END_OF_ERROR = 300


def printable(text: str) -> str:
    r"""Text that does nothing to a terminal, whatever a file or its name holds: an escape becomes ``\x1b``."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if character not in "\n\t" and unicodedata.category(character) in _OBEYED
        else character
        for character in text
    )


class _PlainConsole(Console):
    """Prints text as ``printable`` gives it."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable(one) if isinstance(one, str) else one for one in objects), **options)


# Without markup: a folder named "run[1]" is printed as it is.
results = _PlainConsole(highlight=False, markup=False, emoji=False)
"""Standard output: what a user would pipe."""
errors = _PlainConsole(stderr=True, highlight=False, markup=False, emoji=False)
"""Standard error: what ended a command, and where hazardous weights lie."""
notes = _PlainConsole(stderr=True, highlight=False, markup=False, emoji=False)
"""Standard error: progress and messages, which ``--quiet`` silences."""


def print_headline(text: str) -> None:
    """What a command is about to do, in one line, whatever is in the names of models and folders."""
    notes.print(" ".join(text.split()), soft_wrap=True)


def print_error(message: str) -> None:
    """One line, in plain words; of a very long one (a million column names, say) the middle is left out."""
    line = printable(" ".join(message.split()))
    if len(line) > _LONGEST_ERROR:
        line = f"{line[: _LONGEST_ERROR - _END_OF_ERROR]} ... {line[-_END_OF_ERROR:]}"
    errors.print(Text.assemble(("error:", "bold red"), " ", line), soft_wrap=True)


def print_json(content: object) -> None:
    """One JSON document on standard output, and nothing else; no terminal colours it.

    Args:
        content: As JSON holds it; NaN and infinities are none of it.
    """
    typer.echo(json.dumps(content, indent=2, allow_nan=False))


def print_next(*commands: Sequence[str | Path]) -> None:
    """What to do next: commands that can be copied into a shell as they stand.

    Args:
        *commands: Each as the words after ``sku``.
    """
    for number, words in enumerate(commands):
        text = shlex.join(["sku", *map(str, words)])
        results.print(f"{'' if number else 'next':<10}{text}", soft_wrap=True)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Bars on standard error, one a stage, with the time that is left; a function to call them with."""
    with Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=notes,
    ) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage.replace("_", " "), total=total)
            elif done < bars.tasks[tasks[stage]].completed:
                bars.reset(tasks[stage], total=total)  # The same stage of the next job: its time starts anew.
            bars.update(tasks[stage], completed=done, total=total)

        yield show


class _Printer(logging.Handler):
    """Prints messages between the bars, not through them."""

    def emit(self, record: logging.LogRecord) -> None:
        notes.print(record.getMessage(), soft_wrap=True)


@contextmanager
def shown_messages() -> Iterator[None]:
    """Prints what the package logs on standard error: what a judge costs, and where something gives up."""
    logger, handler = logging.getLogger("sku"), _Printer()
    level, passes_on = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    # A library that logs through the root logger gives it a handler, which would print every message once more.
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = passes_on


def before_after_table(rows: Iterable[TableRow]) -> Table:
    """The comparison as a table for the terminal, a section for each kind of prompt."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, header_style="bold", pad_edge=False, collapse_padding=True)
    # Names of sections are long and stand in the first column: they are wrapped, so that the figures fit 80 columns.
    table.add_column("", max_width=33)
    for name in ("base", "unlearned", "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
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
    results.print(f"verdict   {line}", soft_wrap=True)


def print_comparison_notes(comparison: Comparison, *, verbose: bool) -> None:
    """The notes that a reader of the table must know; with ``verbose`` all of them.

    Args:
        comparison: Before and after.
        verbose: Whether ``--verbose`` was given.
    """
    details = () if verbose else comparison.details
    shown = [note for note in comparison.notes if note not in details]
    print_notes(shown)
    if len(shown) < len(comparison.notes):
        results.print(f"          {len(comparison.notes) - len(shown)} more with sku -v", soft_wrap=True)


def print_notes(notes: Iterable[str]) -> None:
    """The sentences under a table, each on a line of its own."""
    for number, note in enumerate(notes):
        results.print(f"{'' if number else chr(10)}note      {note}", soft_wrap=True)


def print_attacks(report: AttackReport) -> None:
    """The attacks as a table, and below it what could not be asked."""
    from sku.report.robustness import attack_rows, left_out_lines

    table = Table(box=SIMPLE_HEAD, show_edge=False, header_style="bold", pad_edge=False)
    table.add_column("harmful by attack", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name in ("unlearned", "95 %", "base", "gibberish"):
        table.add_column(name, justify="right", no_wrap=True)
    shown = ""
    for row in attack_rows(report):
        name, shown = "" if row.attack == shown else row.attack, row.attack
        table.add_row(name, row.setting, row.unlearned, row.interval, row.base, row.gibberish)
    results.print()
    results.print(table)
    for line in left_out_lines(report):
        results.print(line, soft_wrap=True)


def print_precisions(report: PrecisionReport) -> None:
    """The model at each precision as a table, and below it where harm comes back."""
    from sku.report.robustness import precision_cells

    table = Table(box=SIMPLE_HEAD, show_edge=False, header_style="bold", pad_edge=False)
    table.add_column("weights", no_wrap=True)
    for name in ("forget set", "unseen", "prefill", "gibberish", "ppl", "kept"):
        table.add_column(name, justify="right", no_wrap=True)
    for cells in precision_cells(report):
        table.add_row(*cells)
    results.print("\nharmful by precision of the weights; prefill: worst (tokens); kept: of change")
    results.print(table)
    print_notes(report.notes)


def comparison_table(records: Sequence[MethodRecord], order: Sequence[str]) -> Table:
    """The comparison in short, for the terminal: unseen prompts, every method at equal utility, then as published."""
    from sku.report.method_tables import comparison_rows, ratio_text
    from sku.report.tables import percent

    table = Table(box=SIMPLE_HEAD, show_edge=False, header_style="bold", pad_edge=False, padding=(0, 0))
    table.add_column("", no_wrap=True)
    for heading in ("harmful", "prefill", "gibber.", "exact", "ppl", "at", "seeds"):
        table.add_column(heading, justify="right", no_wrap=True)

    def share(estimate: Estimate | None) -> str:
        return "\u2013" if estimate is None else percent(estimate.value)

    headings: dict[Role, str] = {"best": "at equal utility", "published": "as published"}
    for role, heading in headings.items():
        table.add_row(Text(heading, style="bold"))
        for row in comparison_rows(records, role, order=order):
            found = row.estimates.get
            ratio = found("perplexity_normal")
            length = "" if row.prefill_tokens is None else f" ({row.prefill_tokens})"
            table.add_row(
                f" {row.title}",
                share(found("harmful_unseen")),
                share(found("forced_start_unseen")) + length,
                share(found("gibberish_unseen")),
                share(found("exact_answers")),
                "\u2013" if ratio is None else f"\u00d7{ratio_text(ratio.value)}",
                "\u2013" if row.strength is None else f"{row.strength:.3g}",
                row.seeds.split(" ")[0],
            )
    return table
