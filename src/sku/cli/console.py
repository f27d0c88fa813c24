"""Printing: results, errors, messages and tables; how much of it (``--quiet``, ``--verbose``); and plans."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from sku.progress import shown_progress

if TYPE_CHECKING:
    from sku.attacks import AttackReport
    from sku.evaluate.comparison import Comparison
    from sku.pipeline import CommandPlan, Progress
    from sku.report.tables import KeyFigure
    from sku.report.words import TableRow

T = TypeVar("T")

Loudness = Literal["quiet", "usual", "verbose"]
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
    """Prints text as ``printable`` gives it, and leaves its lines whole for whoever reads them from a pipe."""

    def print(self, *objects: Any, **options: Any) -> None:
        options.setdefault("soft_wrap", all(isinstance(one, str | Text) for one in objects))
        super().print(*(printable(one) if isinstance(one, str) else one for one in objects), **options)

    def on_broken_pipe(self) -> None:
        """Of standard error: nobody reads what is said any more, and the work goes on; rich would end it."""
        if not self.stderr:
            super().on_broken_pipe()
        self.quiet = True
        with suppress(OSError):  # So that what is left in the buffer doesn't fail at the end; a test's is no file.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


# Without markup: a folder named "run[1]" is printed as it is.
results = _PlainConsole(highlight=False, markup=False, emoji=False)
"""Standard output: what a user would pipe."""
errors = _PlainConsole(stderr=True, highlight=False, markup=False, emoji=False)
"""Standard error: what ended a command, and where hazardous weights lie."""
notes = _PlainConsole(stderr=True, highlight=False, markup=False, emoji=False)
"""Standard error: progress and messages, which ``--quiet`` silences."""


def plain_table(
    words: Iterable[str | Column],
    figures: Iterable[str] = (),
    padding: tuple[int, int] | tuple[int, int, int, int] = (0, 1),
) -> Table:
    """A table without lines: columns of words, then columns of figures; none is wrapped that has only a name."""
    return Table(
        *(Column(name, no_wrap=True) if isinstance(name, str) else name for name in words),
        *(Column(name, justify="right", no_wrap=True) for name in figures),
        box=SIMPLE_HEAD,
        show_edge=False,
        header_style="bold",
        pad_edge=False,
        padding=padding,
    )


def print_headline(text: str) -> None:
    """What a command is about to do, in one line, whatever is in the names of models and folders."""
    notes.print(" ".join(text.split()))


def print_error(message: str) -> None:
    """One line, in plain words; of a very long one (a million column names, say) the middle is left out."""
    line = printable(" ".join(message.split()))
    if len(line) > _LONGEST_ERROR:
        line = f"{line[: _LONGEST_ERROR - _END_OF_ERROR]} ... {line[-_END_OF_ERROR:]}"
    errors.print(Text.assemble(("error:", "bold red"), " ", line))


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
        results.print(f"{'' if number else 'next':<10}{text}")


class _Printer(logging.Handler):
    """Prints messages between the bars, not through them."""

    def emit(self, record: logging.LogRecord) -> None:
        notes.print(record.getMessage())


_PRINTER = _Printer(logging.INFO)


@contextmanager
def shown_messages() -> Iterator[None]:
    """Prints what the package logs on standard error: what a judge costs, and where something gives up."""
    logger = logging.getLogger("sku")
    level, passes_on = logger.level, logger.propagate
    logger.addHandler(_PRINTER)
    logger.setLevel(logging.INFO)
    # A library that logs through the root logger gives it a handler, which would print every message once more.
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(_PRINTER)
        logger.setLevel(level)
        logger.propagate = passes_on


def print_notes(texts: Iterable[str]) -> None:
    """The sentences under a table, each on a line of its own."""
    for number, text in enumerate(texts):
        results.print(f"{'' if number else chr(10)}note      {text}")


_loudness: Loudness = "usual"


def set_loudness(loudness: Loudness) -> None:
    """Sets how much this process says, from the next line on.

    Args:
        loudness: ``quiet`` leaves results and errors; ``verbose`` adds all measures and notes.
    """
    global _loudness
    _loudness = loudness
    notes.quiet = loudness == "quiet"
    logging.disable(logging.WARNING if notes.quiet else logging.NOTSET)
    if notes.quiet:
        warnings.simplefilter("ignore")


def is_verbose() -> bool:
    """Whether ``--verbose`` was given."""
    return _loudness == "verbose"


def carry_out(plan: CommandPlan[T], *, dry_run: bool, as_json: bool, is_main: bool = True, **options: Any) -> T:
    """``perform`` for a plan; where it is only to be printed, the command ends here.

    Raises:
        SystemExit: With code 0, where there is nothing more to print; no command takes it for an error.
    """
    if not dry_run:
        return perform(plan.execute, is_main=is_main, **options)
    if is_main:
        print_plan(plan, as_json=as_json)
    raise SystemExit(0)


def perform(
    action: Callable[[Progress | None], T], *, headline: str = "", interrupted: str = "", is_main: bool = True
) -> T:
    """Does what a command is for, with progress and messages.

    Args:
        action: It; given what shows progress.
        headline: What it is about to do.
        interrupted: What to say where it is interrupted; empty: what ``main`` says.
        is_main: Of several processes the first one speaks for all: the others end here.

    Raises:
        SystemExit: With code 0, in the other processes.
    """
    if not is_main:
        action(None)
        raise SystemExit(0)
    if headline:
        print_headline(headline)
    try:
        with shown_messages(), shown_progress(notes) as show:
            return action(show)
    except KeyboardInterrupt:
        if not interrupted:
            raise
        errors.print(interrupted)
        raise typer.Exit(130) from None


def print_plan(plan: CommandPlan[Any], *, as_json: bool) -> None:
    """What would be done and written, as lines or as one JSON document."""
    told = plan.to_dict()
    if as_json:
        print_json(told)
        return
    size = f"about {plan.disk_bytes / 2**20:,.0f} MiB at most" if plan.disk_bytes else "replies and figures only"
    lines = {
        **plan.settings,
        "examples": plan.examples,
        "into": plan.out,
        "disk": f"{size}, {told['free_bytes'] / 2**20:,.0f} MiB are free",
        "memory": told["memory"],
        "hazard": None if plan.bad_model == "none" else f"the bad model of stage 1 is {plan.bad_model}",
    }
    shown = [(name, value) for name, value in lines.items() if value is not None and value != {}]
    shown += [("note", note) for note in plan.notes]
    width = max(len(name) for name, _ in shown) + 2
    for name, value in shown:
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {entry}" for key, entry in value.items())
        results.print(f"{name:<{width}}{value}")
    results.print(f"\nnothing was written: {plan.command} without --dry-run does it")


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
