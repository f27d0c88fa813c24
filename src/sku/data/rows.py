"""From rows to examples: what every source shares.

A source is a function from one row to its prompt and answer pairs. Emptiness, doubles and broken text are judged
here, once, so that each source counts them alike.
"""

from __future__ import annotations

import ast
import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from sku.data.examples import ForgetExample, RetainExample, normalise_prompt
from sku.errors import DataError, did_you_mean

Row = Mapping[str, Any]
Kind = Literal["forget", "retain"]


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
    """Whether the answers of the row came to their end."""


@dataclass(frozen=True)
class SafeAnswer:
    """An answer marked safe: no forget example, counted as left out, but of use to those with the same prompt."""

    prompt: object
    answer: object
    finished: bool = True


@dataclass(frozen=True)
class LeftOut:
    """Why a row, or one answer of it, gives no example."""

    reason: str


_Text = tuple[str, bool]
"""An answer, and whether it came to its end."""
RowParser = Callable[[Row], Iterable[Pair | SafeAnswer | LeftOut]]
E = TypeVar("E", ForgetExample, RetainExample)


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
    examples: list[E] = []
    left_out: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    safe_answers: defaultdict[str, list[_Text]] = defaultdict(list)
    rows_read = 0
    for row in rows:
        rows_read += 1
        finished = _finished(row)
        for parsed in parse(row):
            found = _marked(parsed, finished)
            _collect_safe_answer(found, safe_answers)
            example = _to_example(found, example_type)
            if isinstance(example, LeftOut):
                left_out[example.reason] += 1
                continue
            key = (normalise_prompt(example.prompt), example.answer)
            if key in seen:
                left_out["duplicate"] += 1
                continue
            seen.add(key)
            examples.append(example)
    return ParsedRows(
        examples=[_with_safe_answer(example, safe_answers, seen) for example in examples],
        rows_read=rows_read,
        left_out=dict(sorted(left_out.items())),
    )


def _to_example(found: Pair | SafeAnswer | LeftOut, example_type: type[E]) -> E | LeftOut:
    if isinstance(found, LeftOut):
        return found
    if isinstance(found, SafeAnswer):
        return LeftOut(SAFE)
    prompt, answer = _clean("prompt", found.prompt), _clean("answer", found.answer)
    if isinstance(prompt, LeftOut):
        return prompt
    if isinstance(answer, LeftOut):
        return answer
    example = example_type(
        prompt=prompt, answer=answer, category=found.category, group=found.group, finished=found.finished
    )
    safe_answer = _clean("safe answer", found.safe_answer)
    if isinstance(example, ForgetExample) and isinstance(safe_answer, str):
        return dataclasses.replace(example, safe_answer=safe_answer, safe_answer_finished=found.finished)
    return example


def _finished(row: Row) -> bool | None:
    """Whether a row's answers came to their end; None where its cell can't be understood."""
    cell = row.get(FINISHED)
    if cell is None or cell != cell or not str(cell).strip():  # NaN is what Parquet files hold for nothing.
        return True
    return parse_flag(cell)


def _marked(found: Pair | SafeAnswer | LeftOut, finished: bool | None) -> Pair | SafeAnswer | LeftOut:
    if isinstance(found, LeftOut):
        return found
    return LeftOut(UNCLEAR_END) if finished is None else dataclasses.replace(found, finished=finished)


def _collect_safe_answer(found: Pair | SafeAnswer | LeftOut, safe_answers: defaultdict[str, list[_Text]]) -> None:
    """Notes the safe answer of a row, if it is text, under its normalised prompt."""
    if isinstance(found, LeftOut):
        return
    prompt = _clean("prompt", found.prompt)
    answer = _clean("safe answer", found.answer if isinstance(found, SafeAnswer) else found.safe_answer)
    if isinstance(prompt, str) and isinstance(answer, str):
        safe_answers[normalise_prompt(prompt)].append((answer, found.finished))


def _with_safe_answer(example: E, safe_answers: Mapping[str, list[_Text]], harmful: Container[tuple[str, str]]) -> E:
    """The example with the first safe answer to its prompt that is none of the harmful ones, its own row's first."""
    if not isinstance(example, ForgetExample):
        return example
    prompt = normalise_prompt(example.prompt)
    own = [] if example.safe_answer is None else [(example.safe_answer, example.safe_answer_finished)]
    candidates = own + safe_answers.get(prompt, [])
    chosen, finished = next((found for found in candidates if (prompt, found[0]) not in harmful), (None, True))
    return dataclasses.replace(example, safe_answer=chosen, safe_answer_finished=finished)


def _clean(name: str, cell: object) -> str | LeftOut:
    if cell is None:
        return LeftOut(f"empty {name}")
    if not isinstance(cell, str):
        return LeftOut(f"{name} is not text")
    text = cell.strip()
    if not text:
        return LeftOut(f"empty {name}")
    return text if is_valid_unicode(text) else LeftOut(f"{name} is not valid Unicode")


def is_valid_unicode(text: str) -> bool:
    """Whether text can be written as UTF-8, which a lone surrogate can't; no tokenizer takes one."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def require_columns(needed: Iterable[str], columns: Collection[str], format_name: str) -> None:
    """Refuses a table without a needed column.

    Raises:
        DataError: With the missing column, the columns found, and the one that comes near.
    """
    for name in needed:
        if name not in columns:
            raise DataError(
                f"format {format_name} needs a column {name}.{did_you_mean(name, columns)} "
                f"Columns found: {', '.join(columns) or 'none'}"
            )


def parse_flag(cell: object) -> bool | None:
    """Reads a true/false cell, which CSV files hold as text; ``bool("False")`` would be true.

    Returns:
        The value, or None where the cell holds neither.
    """
    if isinstance(cell, bool):
        return cell
    return {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}.get(
        str(cell).strip().lower()
    )


def category_text(cell: object) -> str | None:
    """The category of an example: names of the true entries of a dict of flags, or the text of the cell.

    Args:
        cell: ``{"violence": False, "fraud": True}``, the same as text (a CSV export), a name, or None.

    Returns:
        Such as ``fraud``, several joined by ``"; "``; None where there is none.
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


def marked_answer(prompt: object, answer: object, is_safe: object, category: object) -> Pair | SafeAnswer | LeftOut:
    """What an answer is by its mark, as PKU-SafeRLHF and BeaverTails mark them: the pair of an unsafe one."""
    flag = parse_flag(is_safe)
    if flag is None:
        return LeftOut(UNMARKED)
    return SafeAnswer(prompt, answer) if flag else Pair(prompt, answer, category_text(category))


FINISHED = "finished"
"""Column of every format, optional: whether the answers of a row came to their end."""
UNCLEAR_END = "finished is neither true nor false"
SAFE = "safe answer"
"""Reason counted for answers marked safe: they are no forget examples."""
UNMARKED = "marked neither safe nor unsafe"
