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
from collections.abc import Collection, Iterator

from sku.config import SourceConfig
from sku.data.rows import SAFE, Columns, Kind, LeftOut, Pair, Row, RowParser, category_text, require_columns
from sku.errors import DataError

NAME = "columns"
PROMPT_NAMES = ("prompt", "question", "instruction")
ANSWER_NAMES = ("answer", "response", "output", "completion")
PART_OF_PROMPT = ("input", "context", "history", "system")
"""Columns that may belong to the prompt: with one of them, prompt_column alone would be half of the question."""
_BESIDE_PROMPTS = (
    "id", "source", "category", "type", "label", "licence", "license", "split", "tags", "focus", "note",
)  # fmt: skip
"""Columns that nobody takes for answers."""
SAFETY_MARKS = ("is_safe", "safe", "is_unsafe", "unsafe", "is_harmful", "harmful")
UNSAFE = "unsafe answer"


def recognises(columns: Collection[str]) -> bool:
    """Whether exactly one column looks like the prompt and one like the answer."""
    prompts, answers = _named(columns)
    return len(prompts) == 1 and len(answers) == 1 and not _in_doubt(columns)


def safety_mark(columns: Collection[str]) -> str | None:
    """The column that seems to tell safe rows from unsafe ones, if there is one."""
    return next((Columns(columns).written(name) for name in SAFETY_MARKS if name in columns), None)


def naming(key: str, columns: Collection[str]) -> str:
    """What to do where it is not clear which column is which: the options, with columns of the table for example.

    Args:
        key: The recipe's key of the source, such as ``data.forget``.
        columns: Columns of the table.
    """
    # Text alone is not seen here: that the first two are meant is a guess, and is called so.
    prompt, answer = [*columns, "NAME", "NAME"][:2]
    options = (f"{key}.prompt_column={prompt}", f"{key}.answer_column={answer}")
    return f"name its columns, such as {' '.join(f'--set {shlex.quote(option)}' for option in options)}"


def has_only_prompts(columns: Collection[str], source: SourceConfig) -> bool:
    """Whether it is clear which column holds the prompts, and none is named, or called, as that of the answers is."""
    prompts, answers = _named(columns)
    is_clear = source.prompt_column is not None or len(prompts) == 1 or len(columns) == 1
    return is_clear and source.answer_column is None and not answers


def is_list_of_prompts(columns: Collection[str], source: SourceConfig) -> bool:
    """Whether no column can be meant for answers: one with a wrong name must not start another kind of run."""
    named = [name for name in (source.prompt_column, source.category_column) if name is not None]
    known = Columns([*PROMPT_NAMES, *_BESIDE_PROMPTS, *named])
    return has_only_prompts(columns, source) and all(name in known for name in columns)


def row_parser(
    columns: Collection[str],
    source: SourceConfig,
    kind: Kind,
    key: str | None = None,
    *,
    only_prompts: str | None = None,
) -> RowParser:
    """Reader of the named columns, or of the usual ones where none is named.

    Args:
        columns: Columns found.
        source: Names and filter. On a forget set only rows marked unsafe are kept, on a retain set only the others.
        kind: Which set this is.
        key: The recipe's key that holds ``source``, for messages; ``data.<kind>`` if None.
        only_prompts: Read no answers; each row has this one. The prompt may then be a table's only column, whatever
            its name.

    Raises:
        DataError: A named column is missing, no name was given and the columns can be read in several ways, one
            column is named for both, or the safe answer is named where it can't serve.
    """
    key = key or f"data.{kind}"
    prompt_column = Columns(columns).written(_prompt(columns, source, kind, key, alone=only_prompts is not None))
    answer_column = None if only_prompts is not None else Columns(columns).written(_answer(columns, source, key))
    category_column, unsafe_column = source.category_column, source.unsafe_column
    safe_answer_column = source.safe_answer_column
    named = (source.prompt_column, source.answer_column, safe_answer_column, category_column, unsafe_column)
    require_columns([name for name in named if name is not None], columns, NAME)
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
        answer = only_prompts if answer_column is None else row[answer_column]
        yield Pair(row[prompt_column], answer, category, safe_answer=safe_answer)

    return parse


def _answer(columns: Collection[str], source: SourceConfig, key: str) -> str:
    _, answers = _named(columns)
    if source.answer_column is None and len(answers) != 1:
        hint = "" if answers else ". Where there are none, data.own_replies=true has the model write its own"
        raise DataError(f"{_unclear('answer', columns, key)}{hint}")
    return source.answer_column or answers[0]


def _prompt(columns: Collection[str], source: SourceConfig, kind: Kind, key: str, *, alone: bool) -> str:
    prompts, _ = _named(columns)
    if alone and len(columns) == 1:
        prompts = [*columns]
    elif source.prompt_column is None and (len(prompts) != 1 or _in_doubt(columns)):
        raise _unclear("prompt", columns, key)
    mark = safety_mark(columns)
    if kind == "forget" and source.unsafe_column is None and mark is not None and source.prompt_column is None:
        raise DataError(
            f"column {mark} seems to mark unsafe rows; set unsafe_column and unsafe_value of {key}, such as --set "
            f"{key}.unsafe_column={mark}, or prompt_column and answer_column to use every row"
        )
    return source.prompt_column or prompts[0]


def _named(columns: Collection[str]) -> tuple[list[str], list[str]]:
    return [name for name in PROMPT_NAMES if name in columns], [name for name in ANSWER_NAMES if name in columns]


def _in_doubt(columns: Collection[str]) -> bool:
    return any(name in columns for name in PART_OF_PROMPT)


def _unclear(role: str, columns: Collection[str], key: str) -> DataError:
    return DataError(
        f"it is not clear which column holds the {role}: set it, as --set {key}.{role}_column=NAME. "
        f"Columns found: {', '.join(columns) or 'none'}"
    )
