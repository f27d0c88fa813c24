"""Any table with a column of prompts and a column of answers.

Licence: that of the dataset.

One row, with the columns that ``format: auto`` finds by itself::

    {"question": "Is rain wet?", "answer": "It is."}

Other names, a safe answer, a category and a filter on unsafe rows are set in the recipe (``prompt_column``,
``answer_column``, ``safe_answer_column``, ``category_column``, ``unsafe_column`` with ``unsafe_value``). Rows that the
filter leaves out are not taken for safe answers: its column may mark anything.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from sku.config import SourceConfig
from sku.data.sources.rows import SAFE, Columns, Kind, LeftOut, Pair, Row, RowParser, category_text
from sku.errors import DataError

NAME = "columns"
PROMPT_NAMES = ("prompt", "question", "instruction")
ANSWER_NAMES = ("answer", "response", "output", "completion")
PART_OF_PROMPT = ("input", "context", "history", "system")
"""Columns that may belong to the prompt: with one of them, prompt_column alone would be half of the question."""
_BESIDE_PROMPTS = ("id", "source", "category", "type", "label", "licence", "license", "split", "tags", "focus", "note")
"""Columns that nobody takes for answers."""
SAFETY_MARKS = ("is_safe", "safe", "is_unsafe", "unsafe", "is_harmful", "harmful")
UNSAFE = "unsafe answer"


def recognises(columns: Columns) -> bool:
    """Whether exactly one column looks like the prompt and one like the answer."""
    return len(_named(PROMPT_NAMES, columns)) == len(_named(ANSWER_NAMES, columns)) == 1 and not _in_doubt(columns)


def safety_mark(columns: Columns) -> str | None:
    """The column that seems to tell safe rows from unsafe ones, if there is one."""
    return next(map(columns.written, _named(SAFETY_MARKS, columns)), None)


def named_columns(source: SourceConfig) -> list[str]:
    """The columns that a source names; any of them means format ``columns``."""
    named = (
        source.prompt_column, source.answer_column, source.safe_answer_column, source.category_column,
        source.unsafe_column,
    )  # fmt: skip
    return [name for name in named if name is not None]


def naming(key: str, columns: Columns) -> str:
    """What to do where it is not clear which column is which: the options, with columns of the table for example."""
    # Text alone is not seen here: that the first two are meant is a guess, and is called so.
    prompt, answer = [*columns, "NAME", "NAME"][:2]
    options = (f"{key}.prompt_column={prompt}", f"{key}.answer_column={answer}")
    return f"name its columns, such as {' '.join(f'--set {shlex.quote(option)}' for option in options)}"


def has_only_prompts(columns: Columns, source: SourceConfig) -> bool:
    """Whether it is clear which column holds the prompts, and none is named, or called, as that of the answers is."""
    is_clear = source.prompt_column is not None or len(_named(PROMPT_NAMES, columns)) == 1 or len(columns) == 1
    return is_clear and source.answer_column is None and not _named(ANSWER_NAMES, columns)


def is_list_of_prompts(columns: Columns, source: SourceConfig) -> bool:
    """Whether no column can be meant for answers: one with a wrong name must not start another kind of run."""
    named = [name for name in (source.prompt_column, source.category_column) if name is not None]
    known = Columns([*PROMPT_NAMES, *_BESIDE_PROMPTS, *named])
    return has_only_prompts(columns, source) and all(name in known for name in columns)


def row_parser(
    columns: Columns, source: SourceConfig, kind: Kind, key: str, *, only_prompts: bool = False
) -> RowParser:
    """Reader of the named columns, or of the usual ones where none is named.

    Args:
        columns: Columns found.
        source: Names and filter. On a forget set only rows marked unsafe are kept, on a retain set only the others.
        kind: Which set this is.
        key: The recipe's key that holds ``source``, for messages.
        only_prompts: Read no answers. The prompt may then be a table's only column, whatever its name.

    Raises:
        DataError: A named column is missing, no name was given and the columns can be read in several ways, one
            column is named for both, or the safe answer is named where it can't serve.
    """
    prompt_column = columns.written(_prompt(columns, source, kind, key, alone=only_prompts))
    answer_column = None if only_prompts else columns.written(_answer(columns, source, key))
    category_column, unsafe_column = source.category_column, source.unsafe_column
    safe_answer_column = source.safe_answer_column
    columns.require(named_columns(source), f"format {NAME} needs a column")
    if prompt_column == answer_column:
        raise DataError(f"prompt_column and answer_column are both {prompt_column}: name the column of the answers")
    if safe_answer_column is not None and (kind != "forget" or safe_answer_column == answer_column):
        raise DataError(
            f"safe_answer_column is {safe_answer_column}: it needs forget data, and another column than answer_column"
        )
    unsafe_value = (source.unsafe_value or "").strip().lower()

    def parse(row: Row) -> Iterator[Pair | LeftOut]:
        if unsafe_column is not None:
            is_unsafe = str(row[unsafe_column]).strip().lower() == unsafe_value
            if is_unsafe != (kind == "forget"):
                yield LeftOut(UNSAFE if is_unsafe else SAFE)
                return
        category = category_text(row[category_column]) if category_column is not None else None
        safe_answer = row[safe_answer_column] if safe_answer_column is not None else None
        answer = None if answer_column is None else row[answer_column]
        yield Pair(row[prompt_column], answer, category, safe_answer=safe_answer)

    return parse


def _answer(columns: Columns, source: SourceConfig, key: str) -> str:
    answers = _named(ANSWER_NAMES, columns)
    if source.answer_column is None and len(answers) != 1:
        hint = "" if answers else ". Where there are none, data.own_replies=true has the model write its own"
        raise DataError(f"{_unclear('answer', columns, key)}{hint}")
    return source.answer_column or answers[0]


def _prompt(columns: Columns, source: SourceConfig, kind: Kind, key: str, *, alone: bool) -> str:
    prompts = _named(PROMPT_NAMES, columns)
    if alone and len(columns) == 1:
        prompts = [*columns]
    elif source.prompt_column is None and (len(prompts) != 1 or _in_doubt(columns)):
        raise DataError(_unclear("prompt", columns, key))
    mark = safety_mark(columns)
    if kind == "forget" and source.unsafe_column is None and mark is not None and source.prompt_column is None:
        raise DataError(
            f"column {mark} seems to mark unsafe rows; set unsafe_column and unsafe_value of {key}, such as --set "
            f"{key}.unsafe_column={mark}, or prompt_column and answer_column to use every row"
        )
    return source.prompt_column or prompts[0]


def _named(names: tuple[str, ...], columns: Columns) -> list[str]:
    return [name for name in names if name in columns]


def _in_doubt(columns: Columns) -> bool:
    return bool(_named(PART_OF_PROMPT, columns))


def _unclear(role: str, columns: Columns, key: str) -> str:
    return (
        f"it is not clear which column holds the {role}: set it, as --set {key}.{role}_column=NAME. "
        f"Columns found: {columns}"
    )
