"""From rows to examples: what every format shares.

A format is a function from one row to its prompt and answer pairs. Emptiness, doubles and broken text are judged
here, once, so that each format counts them alike.
"""

from __future__ import annotations

import ast
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal

from sku.data.examples import E, ForgetExample, is_valid_unicode, normalise_prompt
from sku.errors import DataError, did_you_mean

Row = Mapping[str, Any]
Kind = Literal["forget", "retain"]

FINISHED = "finished"
"""Column of every format, optional: whether the answers of a row came to their end."""
UNCLEAR_END = "finished is neither true nor false"
SAFE = "safe answer"
"""Reason counted for answers marked safe: they are no forget examples."""
UNMARKED = "marked neither safe nor unsafe"


class Columns(Collection[str]):
    """Names of columns, compared without case and space around them; printed as they are written in the file."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = dict.fromkeys(names)
        self._written: dict[str, str] = {}
        for name in self._names:
            self._written.setdefault(_plain(name), name)

    def __contains__(self, name: object) -> bool:
        return name in self._names or (isinstance(name, str) and _plain(name) in self._written)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def written(self, name: str) -> str:
        """The name as the file has it; where two columns differ in case alone, each is meant by its own spelling."""
        return name if name in self._names else self._written.get(_plain(name), name)

    def require(self, names: Iterable[str], who: str, why: str = "") -> None:
        """Refuses a table without a needed column.

        Raises:
            DataError: ``who``, the missing column, ``why``, the one that comes near, and the columns found.
        """
        for name in names:
            if name not in self:
                raise DataError(f"{who} {name}{why}.{did_you_mean(name, self)} Columns found: {self}")

    def __str__(self) -> str:
        return ", ".join(self) or "none"


def _plain(name: str) -> str:
    return name.strip().casefold()


class Cells(Mapping[str, Any]):
    """A row whose cells are found by names as ``Columns`` compares them."""

    def __init__(self, row: Row, columns: Columns) -> None:
        self._row, self._columns = row, columns

    def __getitem__(self, name: str) -> Any:
        return self._row[self._columns.written(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)


@dataclass(frozen=True)
class Pair:
    """A prompt and an answer as a row has them: not yet known to be text."""

    prompt: object
    answer: object
    category: str | None = None
    group: str | None = None
    safe_answer: object = None
    """A good answer to the same prompt, of the same row."""
    finished: bool = True
    """Whether the answer came to its end, as far as the format knows; a cell of the row may say no as well."""
    marked_safe: bool = False
    """There is ``safe_answer`` alone: no forget example, counted as left out, but of use to others of its prompt."""


@dataclass(frozen=True)
class LeftOut:
    """Why a row, or one answer of it, gives no example."""

    reason: str


RowParser = Callable[[Row], Iterable[Pair | LeftOut]]


@dataclass(frozen=True)
class Form:
    """Columns that a format has had, and the reader of such rows."""

    columns: tuple[str, ...]
    parse: RowParser
    unless: str | None = None
    """A column that another format has beside these."""


@dataclass(frozen=True)
class Format:
    """One known set of columns, or several."""

    name: str
    forms: tuple[Form, ...]
    kinds: tuple[Kind, ...] = ("forget", "retain")
    """What its rows can be used for."""
    reads_marks: bool = True
    """Whether it has a column of its own for what is safe."""
    named_only: bool = False
    """Whether it is never recognised: a source must name it."""

    def recognises(self, columns: Columns) -> bool:
        """Whether a table with these columns has one of the forms."""
        return not self.named_only and any(
            all(name in columns for name in form.columns) and (form.unless is None or form.unless not in columns)
            for form in self.forms
        )

    def row_parser(self, columns: Columns) -> RowParser:
        """The reader of the form that the columns come nearest to.

        Raises:
            DataError: A column of it is missing.
        """
        form = max(self.forms, key=lambda form: sum(name in columns for name in form.columns))
        columns.require(form.columns, f"format {self.name} needs a column")
        return form.parse


_Text = tuple[str, bool]
"""An answer, and whether it came to its end."""


@dataclass(frozen=True, kw_only=True)
class ParsedRows(Generic[E]):
    """Examples of one source, and the account of what gave none."""

    examples: list[E]
    rows_read: int
    left_out: dict[str, int] = field(default_factory=dict)


def parse_rows(rows: Iterable[Row], parse: RowParser, example_type: type[E]) -> ParsedRows[E]:
    """Turns rows into examples; space around prompts and answers is removed.

    In every format a row may say in ``finished`` (true or false) whether its answers came to their end; without a word
    they did.

    The safe answer of a forget example is that of its own row, else the first one in the file to the same normalised
    prompt. A text that is a harmful answer to that prompt as well is no safe answer.

    Args:
        rows: Rows of the source.
        parse: Gives each row's pairs, or why it has none.
        example_type: ``ForgetExample`` or ``RetainExample``.

    Returns:
        The examples in order, without doubles (same normalised prompt, same answer), and the count of each reason.
    """
    examples: dict[tuple[str, str], E] = {}
    left_out: Counter[str] = Counter()
    safe_answers: defaultdict[str, list[_Text]] = defaultdict(list)
    rows_read = 0
    for row in rows:
        rows_read += 1
        finished = _finished(row)
        for found in parse(row):
            example = _example(found, finished, example_type)
            if isinstance(found, Pair) and finished is not None:
                prompt, safe = _text("prompt", found.prompt), _text("safe answer", found.safe_answer)
                if isinstance(prompt, str) and isinstance(safe, str):
                    safe_answers[normalise_prompt(prompt)].append((safe, finished))
            if isinstance(example, LeftOut):
                left_out[example.reason] += 1
            elif (key := (normalise_prompt(example.prompt), example.answer)) in examples:
                left_out["duplicate"] += 1
            else:
                examples[key] = example
    return ParsedRows(
        examples=[_with_safe_answer(example, safe_answers, examples) for example in examples.values()],
        rows_read=rows_read,
        left_out=dict(sorted(left_out.items())),
    )


def _finished(row: Row) -> bool | None:
    """Whether a row's answers came to their end; None where its cell can't be understood."""
    cell = row.get(FINISHED)
    if cell is None or cell != cell or not str(cell).strip():  # NaN is what Parquet files hold for nothing.
        return True
    return parse_flag(cell)


def _example(found: Pair | LeftOut, finished: bool | None, example_type: type[E]) -> E | LeftOut:
    if isinstance(found, LeftOut):
        return found
    if finished is None or found.marked_safe:
        return LeftOut(UNCLEAR_END if finished is None else SAFE)
    prompt, answer = _text("prompt", found.prompt), _text("answer", found.answer)
    if isinstance(prompt, LeftOut):
        return prompt
    if isinstance(answer, LeftOut):
        return answer
    example = example_type(
        prompt=prompt,
        answer=answer,
        category=found.category,
        group=found.group,
        finished=finished and found.finished,
    )
    safe_answer = _text("safe answer", found.safe_answer)
    if isinstance(example, ForgetExample) and isinstance(safe_answer, str):
        return replace(example, safe_answer=safe_answer, safe_answer_finished=finished)
    return example


def _with_safe_answer(example: E, safe_answers: Mapping[str, list[_Text]], harmful: Container[tuple[str, str]]) -> E:
    """The example with the first safe answer to its prompt that is none of the harmful ones, its own row's first."""
    if not isinstance(example, ForgetExample):
        return example
    prompt = normalise_prompt(example.prompt)
    own = [] if example.safe_answer is None else [(example.safe_answer, example.safe_answer_finished)]
    candidates = own + safe_answers.get(prompt, [])
    chosen, finished = next((found for found in candidates if (prompt, found[0]) not in harmful), (None, True))
    return replace(example, safe_answer=chosen, safe_answer_finished=finished)


def _text(name: str, cell: object) -> str | LeftOut:
    if cell is not None and not isinstance(cell, str):
        return LeftOut(f"{name} is not text")
    text = (cell or "").strip()
    if not text:
        return LeftOut(f"empty {name}")
    return text if is_valid_unicode(text) else LeftOut(f"{name} is not valid Unicode")


def parse_flag(cell: object) -> bool | None:
    """Reads a true/false cell, which CSV files hold as text (``bool("False")`` would be true); None for neither."""
    return {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}.get(
        str(cell).strip().lower()
    )


def category_text(cell: object) -> str | None:
    """The category of an example, None where there is none.

    Args:
        cell: A name; or flags, ``{"violence": False, "fraud": True}``, as a dict or as text (a CSV export), of which
            the true ones are joined by ``"; "``.
    """
    if isinstance(cell, str) and cell.lstrip().startswith("{"):
        cell = _dict_from_text(cell)
    if isinstance(cell, Mapping):
        return "; ".join(str(name) for name, flag in cell.items() if parse_flag(flag)) or None
    return cell.strip() or None if isinstance(cell, str) else None


def _dict_from_text(text: str) -> object:
    """JSON (``true``) or a Python literal (``True``), as ``json`` and ``pandas`` write dicts into a CSV cell."""
    readers: tuple[Callable[[str], object], ...] = (json.loads, ast.literal_eval)
    for read in readers:
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text
