"""Printing: a console for results, one for messages, and progress bars."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

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
    from sku.report.tables import TableRow

# Without markup: a folder named "run[1]" is printed as it is.
results = Console(highlight=False, markup=False, emoji=False)
"""Standard output: what a user would pipe."""
errors = Console(stderr=True, highlight=False, markup=False, emoji=False)
"""Standard error: progress and messages."""


def print_error(message: str) -> None:
    """One line, in plain words."""
    errors.print(Text.assemble(("error:", "bold red"), " ", " ".join(message.split())), soft_wrap=True)


def quiet_libraries() -> None:
    """Silences bars and notices of libraries, whose lines would break ours. Warnings of Python stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # Read when tqdm is imported, so before the libraries below.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # It warns of a missing CPU kernel when imported.
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


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
        console=errors,
    ) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage.replace("_", " "), total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


def before_after_table(rows: Iterable[TableRow]) -> Table:
    """The comparison as a table for the terminal, a section for each kind of prompt."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, header_style="bold", pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("base", "unlearned", "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("goal", no_wrap=True)
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            table.add_row(Text(section, style="bold"))
        table.add_row(f"  {row.measure}", row.before, row.after, row.interval, row.wanted)
    return table
