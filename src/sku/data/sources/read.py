"""From a source to examples, or prompts alone: the known formats, and how ``format: auto`` tells them apart."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from sku.config.data import EMBEDDED, SourceConfig
from sku.data.examples import (
    E,
    Example,
    ForgetExample,
    Provenance,
    RetainExample,
    content_hash,
    count_safe_answers,
    limited,
    normalise_prompt,
)
from sku.data.sources import embedded
from sku.data.sources.rows import (
    FORMATS,
    SAFE,
    UNMARKED,
    XSTEST,
    XSTEST_COLUMNS,
    Cells,
    Columns,
    Kind,
    LeftOut,
    Pair,
    Row,
    RowParser,
    category_text,
    parse_rows,
    xstest_prompts,
)
from sku.data.sources.tables import read_table
from sku.errors import DataError

COLUMNS = "columns"
"""Name of the format that any table may have: a column of prompts and one of answers.

One row, with the columns that ``format: auto`` finds by itself::

    {"question": "Is rain wet?", "answer": "It is."}

Other names, a category and a filter on unsafe rows are set in the recipe (``prompt_column``, ``answer_column``,
``category_column``, ``where``). Rows that the filter leaves out are not taken for safe answers: its column may mark
anything.
"""
PROMPT_NAMES = ("prompt", "question", "instruction")
ANSWER_NAMES = ("answer", "response", "output", "completion")
PART_OF_PROMPT = ("input", "context", "history", "system")
"""Columns that may belong to the prompt: with one of them, prompt_column alone would be half of the question."""
_BESIDE_PROMPTS = ("id", "source", "category", "type", "label", "licence", "license", "split", "tags", "focus", "note")
"""Columns that nobody takes for answers."""
SAFETY_MARKS = ("is_safe", "safe", "is_unsafe", "unsafe", "is_harmful", "harmful")
HUB_LICENCES = {
    "pku-alignment/pku-saferlhf": "CC-BY-NC-4.0",
    "pku-alignment/pku-saferlhf-qa": "CC-BY-NC-4.0",
    "pku-alignment/beavertails": "CC-BY-NC-4.0",
    "truthfulqa/truthful_qa": "Apache-2.0",
}
"""Lower-case hub id -> licence of that dataset. Anyone's table may have the same columns, and has another licence."""
_UNANSWERED = "-"
"""Stands for each answer where prompts alone are read, so that rows are cleaned and counted as any others."""


def read_examples(
    source: SourceConfig, kind: Kind, example_type: type[E], key: str | None = None, *, only_prompts: bool = False
) -> tuple[list[E], Provenance]:
    """Reads all examples of a source, its ``limit`` aside.

    Args:
        source: File, folder, hub id or ``embedded``.
        kind: Whether they are to be forgotten or retained.
        example_type: ``ForgetExample`` or ``RetainExample``.
        key: The recipe's key that holds ``source``, for messages; ``data.<kind>`` if None.
        only_prompts: Read no answers of a table: each prompt once, with an answer that means nothing.

    Returns:
        The examples, and the account of what was left out.

    Raises:
        DataError: The source can't be read, it is not clear what its columns mean, or no example is left.
    """
    if source.path == EMBEDDED:
        found = [one for one in embedded.examples(source, kind) if isinstance(one, example_type)]
        return found, Provenance(
            source=EMBEDDED, location=EMBEDDED, sha256=content_hash(found), rows_read=len(found),
            safe_answers=count_safe_answers(found), licence=embedded.LICENCE,
        )  # fmt: skip
    table = read_table(source)
    named = Columns(table.columns)
    choose = _choose_prompt_parser if only_prompts else choose_parser
    try:
        name, parser = choose(named, source, kind, key or f"data.{kind}")
    except DataError as error:
        raise DataError(f"{source.path}: {error}") from None
    parsed = parse_rows((Cells(row, named) for row in table.rows), parser, example_type)
    left_out = dict(sorted({**parsed.left_out, **table.left_out}.items()))
    rows_read = parsed.rows_read + sum(table.left_out.values())
    if not parsed.examples:
        what = "prompts" if only_prompts else f"{kind} examples"
        raise DataError(_nothing_left(source, kind, what, rows_read, left_out))
    return parsed.examples, Provenance(
        source=name,
        location=source.path,
        revision=table.revision,
        sha256=content_hash(parsed.examples),
        rows_read=rows_read,
        rows_left_out=left_out,
        safe_answers=count_safe_answers(parsed.examples),
        licence=source.license or (None if table.revision is None else HUB_LICENCES.get(source.path.lower())),
    )


def _nothing_left(source: SourceConfig, kind: Kind, what: str, rows: int, left_out: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{reason}: {count}" for reason, count in left_out.items()) or "it has no rows"
    if kind == "forget" and left_out and set(left_out) <= {SAFE, UNMARKED}:
        return f"{source.path} has no unsafe rows among {rows}, so there is nothing to forget ({reasons})"
    return f"{source.path} gives no {what} from {rows} rows ({reasons})"


def _choose_prompt_parser(found: Columns, source: SourceConfig, kind: Kind, key: str) -> tuple[str, RowParser]:
    """As ``choose_parser``, for prompts alone."""
    parser: RowParser
    if source.prompt_column is None and all(column in found for column in XSTEST_COLUMNS):
        name, parser = XSTEST, lambda row: xstest_prompts(row, kind)
    elif source.prompt_column is None and (is_known(found) or source.format not in ("auto", COLUMNS)):
        name, parser = choose_parser(found, source, kind, key)
    else:
        name, parser = COLUMNS, columns_parser(found, source, kind, key, only_prompts=True)

    def unanswered(one: Pair | LeftOut) -> Pair | LeftOut:
        if isinstance(one, LeftOut):
            return one
        return LeftOut(SAFE) if one.marked_safe else Pair(one.prompt, _UNANSWERED, one.category)

    return name, lambda row: map(unanswered, parser(row))


def is_known(found: Columns) -> bool:
    """Whether a table has columns of one of ``FORMATS``."""
    return any(known.recognises(found) for known in FORMATS)


def choose_parser(found: Columns, source: SourceConfig, kind: Kind, key: str) -> tuple[str, RowParser]:
    """The reader of a table's rows.

    Args:
        found: Columns of the table.
        source: ``format`` as set, or ``auto``.
        kind: Whether the rows are to be forgotten or retained.
        key: The recipe's key that holds ``source``, for messages.

    Returns:
        Name of the format, and the function from a row to its pairs.

    Raises:
        DataError: The columns don't fit the format, none or several fit, or the format can't serve as this kind.
    """
    name = detect_format(found, source, kind, key) if source.format == "auto" else source.format
    if name == COLUMNS:
        return name, columns_parser(found, source, kind, key)
    if name == EMBEDDED:
        raise DataError(f"format {EMBEDDED} goes with path {EMBEDDED}, not with {source.path}")
    chosen = next(known for known in FORMATS if known.name == name)
    if named_columns(source):
        raise DataError(
            f"format {name} has its own columns: leave the *_column settings of {key} empty, or set "
            f"{key}.format=columns"
        )
    if kind not in chosen.kinds:
        raise DataError(f"format {name} gives {chosen.kinds[0]} examples only; for {kind} data use format columns")
    return name, chosen.row_parser(found)


def detect_format(found: Columns, source: SourceConfig, kind: Kind, key: str) -> str:
    """Tells the format by the names of the columns; named columns in ``source`` mean format ``columns``.

    Raises:
        DataError: None or several formats fit, or rows would be forgotten that the table marks as safe.
    """
    if named_columns(source):
        return COLUMNS
    fitting = [known for known in FORMATS if known.recognises(found)]
    if len(fitting) > 1:
        raise DataError(
            f"the columns fit formats {' and '.join(known.name for known in fitting)}: set one, such as --set "
            f"{key}.format={fitting[0].name}. Columns found: {found}"
        )
    if not fitting:
        if are_clear(found):
            return COLUMNS
        raise DataError(f"no known format fits the {kind} data: {naming(key, found)}. Columns found: {found}")
    mark, name = unread_mark(found, source), fitting[0].name
    if kind == "forget" and mark is not None and not fitting[0].reads_marks:
        raise DataError(
            f"column {mark} seems to mark unsafe rows, and format {name} does not read it; say which rows are meant, "
            f"such as --set {key}.where.{mark}=VALUE, or --set {key}.format={name} to use every row"
        )
    return name


def are_clear(columns: Columns) -> bool:
    """Whether exactly one column looks like the prompt and one like the answer."""
    return len(_named(PROMPT_NAMES, columns)) == len(_named(ANSWER_NAMES, columns)) == 1 and not _named(
        PART_OF_PROMPT, columns
    )


def unread_mark(columns: Columns, source: SourceConfig) -> str | None:
    """The column that seems to tell safe rows from unsafe ones, if there is one that ``where`` doesn't name."""
    named = {columns.written(name) for name in source.where if name in columns}
    return next((mark for mark in map(columns.written, _named(SAFETY_MARKS, columns)) if mark not in named), None)


def named_columns(source: SourceConfig) -> list[str]:
    """The columns that a source names; any of them means format ``columns``."""
    named = (source.prompt_column, source.answer_column, source.category_column)
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


def columns_parser(
    columns: Columns, source: SourceConfig, kind: Kind, key: str, *, only_prompts: bool = False
) -> RowParser:
    """Reader of the named columns, or of the usual ones where none is named.

    Args:
        columns: Columns found.
        source: Names.
        kind: Which set this is.
        key: The recipe's key that holds ``source``, for messages.
        only_prompts: Read no answers. The prompt may then be a table's only column, whatever its name.

    Raises:
        DataError: A named column is missing, no name was given and the columns can be read in several ways, or one
            column is named for both.
    """
    prompt_column = columns.written(_prompt(columns, source, kind, key, alone=only_prompts))
    answer_column = None if only_prompts else columns.written(_answer(columns, source, key))
    category_column = source.category_column
    columns.require(named_columns(source), f"format {COLUMNS} needs a column")
    if prompt_column == answer_column:
        raise DataError(f"prompt_column and answer_column are both {prompt_column}: name the column of the answers")

    def parse(row: Row) -> Iterator[Pair | LeftOut]:
        category = category_text(row[category_column]) if category_column is not None else None
        answer = None if answer_column is None else row[answer_column]
        yield Pair(row[prompt_column], answer, category)

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
    elif source.prompt_column is None and (len(prompts) != 1 or _named(PART_OF_PROMPT, columns)):
        raise DataError(_unclear("prompt", columns, key))
    mark = unread_mark(columns, source)
    if kind == "forget" and mark is not None and source.prompt_column is None:
        raise DataError(
            f"column {mark} seems to mark unsafe rows; say which are meant, such as --set {key}.where.{mark}=VALUE, "
            "or set prompt_column and answer_column to use every row"
        )
    return source.prompt_column or prompts[0]


def _named(names: tuple[str, ...], columns: Columns) -> list[str]:
    return [name for name in names if name in columns]


def _unclear(role: str, columns: Columns, key: str) -> str:
    return (
        f"it is not clear which column holds the {role}: set it, as --set {key}.{role}_column=NAME. "
        f"Columns found: {columns}"
    )


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Prompts of one source, each once."""

    prompts: tuple[RetainExample, ...]
    """Without an answer."""
    provenance: Provenance
    """``sha256`` covers prompts and categories."""


def lacks_answers(source: SourceConfig) -> bool:
    """Whether a table has prompts and no column of answers.

    Raises:
        DataError: It can't be read.
    """
    return asks_only(source, has_only_prompts)


def asks_only(source: SourceConfig, looks_so: Callable[[Columns, SourceConfig], bool]) -> bool:
    """Whether the columns of a table of no known format look as if it had prompts alone."""
    if source.path == EMBEDDED or source.format not in ("auto", COLUMNS):
        return False
    found = Columns(read_table(source).columns)
    return not is_known(found) and looks_so(found, source)


def load_prompts(source: SourceConfig, kind: Kind, key: str, *, seed: int) -> PromptSet:
    """Reads the prompts of one source.

    Args:
        source: File, folder, hub id or ``embedded``.
        kind: Whether they are harmful (``forget``) or normal (``retain``).
        key: Names the source in messages.
        seed: Decides which prompts a ``limit`` keeps.

    Returns:
        Each normalised prompt once, in order.

    Raises:
        DataError: As ``load_own_prompts``.
    """
    examples: Sequence[Example]
    if source.path == EMBEDDED and kind == "forget":
        kept, provenance = limited(*read_examples(source, kind, ForgetExample), source.limit, seed)
        unlearned, unseen = embedded.split_forget(kept, source.limit)
        examples = (*unlearned, *unseen)
    else:
        found = read_examples(source, kind, RetainExample, key, only_prompts=True)
        examples, provenance = limited(*found, source.limit, seed)
    return prompt_set(examples, provenance)


def prompt_set(prompts: Sequence[Example], provenance: Provenance) -> PromptSet:
    """Prompts of some examples, whose answers are left off."""
    plain = tuple(RetainExample(prompt=one.prompt, answer="", category=one.category) for one in prompts)
    text = json.dumps([[one.prompt, one.category] for one in plain])
    return PromptSet(
        prompts=plain,
        provenance=replace(provenance, sha256=hashlib.sha256(text.encode()).hexdigest()),
    )


@dataclass(frozen=True, kw_only=True)
class XSTest:
    """Prompts of both kinds; their answers are empty, their category is XSTest's type."""

    safe: tuple[RetainExample, ...]
    unsafe: tuple[ForgetExample, ...]
    left_out: int
    """Prompts that were in the run's own data."""


def load_xstest(path: str, used: Iterable[Example] = ()) -> XSTest:
    """Reads the prompts, to evaluate with both kinds.

    Args:
        path: ``xstest_prompts.csv``, or the same columns in another format or on the hub.
        used: Examples of the run; their prompts are left out here.

    Returns:
        Safe and unsafe prompts, in the order of the file.

    Raises:
        DataError: The file can't be read, lacks a column, or a row is neither safe nor unsafe.
    """
    table = read_table(SourceConfig(path=path))
    missing = [name for name in XSTEST_COLUMNS if name not in table.columns]
    if missing:
        raise DataError(f"{path} has no column {', '.join(missing)}: evaluate.xstest must be xstest_prompts.csv")
    taken = {normalise_prompt(example.prompt) for example in used}
    safe: list[RetainExample] = []
    unsafe: list[ForgetExample] = []
    left_out = 0
    for number, row in enumerate(table.rows, start=1):
        prompt, kind, label = (str(row[name] or "").strip() for name in XSTEST_COLUMNS)
        if not prompt or label not in ("safe", "unsafe"):
            raise DataError(f"{path} row {number} has no prompt, or its label is {label!r}, neither safe nor unsafe")
        if normalise_prompt(prompt) in taken:
            left_out += 1
        elif label == "safe":
            safe.append(RetainExample(prompt=prompt, answer="", category=kind or None))
        else:
            unsafe.append(ForgetExample(prompt=prompt, answer="", category=kind or None))
    return XSTest(safe=tuple(safe), unsafe=tuple(unsafe), left_out=left_out)
