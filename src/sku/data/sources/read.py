"""From a source to examples: the known formats, and how ``format: auto`` tells them apart."""

from __future__ import annotations

from collections.abc import Mapping

from sku.config import EMBEDDED, SourceConfig
from sku.data.examples import E, Provenance, content_hash, count_safe_answers
from sku.data.sources import columns, embedded, passages, trl, truthfulqa, xstest
from sku.data.sources.pku_saferlhf import BEAVERTAILS, PKU_SAFERLHF
from sku.data.sources.rows import SAFE, UNMARKED, Cells, Columns, Kind, LeftOut, Pair, RowParser, parse_rows
from sku.data.sources.tables import read_table
from sku.errors import DataError

FORMATS = (PKU_SAFERLHF, BEAVERTAILS, truthfulqa.FORMAT, *trl.FORMATS, passages.FORMAT)
"""All formats with columns of their own; ``columns`` takes the rest."""
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
    if source.unsafe_column is not None:
        reasons += f"; column {source.unsafe_column} is compared with {source.unsafe_value!r}"
    if kind == "forget" and left_out and set(left_out) <= {SAFE, UNMARKED}:
        return f"{source.path} has no unsafe rows among {rows}, so there is nothing to forget ({reasons})"
    return f"{source.path} gives no {what} from {rows} rows ({reasons})"


def _choose_prompt_parser(found: Columns, source: SourceConfig, kind: Kind, key: str) -> tuple[str, RowParser]:
    """As ``choose_parser``, for prompts alone."""
    parser: RowParser
    if source.prompt_column is None and all(column in found for column in xstest.COLUMNS):
        name, parser = xstest.NAME, lambda row: xstest.prompts_of(row, kind)
    elif source.prompt_column is None and (is_known(found) or source.format not in ("auto", columns.NAME)):
        name, parser = choose_parser(found, source, kind, key)
    else:
        name, parser = columns.NAME, columns.row_parser(found, source, kind, key, only_prompts=True)

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
    if name == columns.NAME:
        return name, columns.row_parser(found, source, kind, key)
    if name == EMBEDDED:
        raise DataError(f"format {EMBEDDED} goes with path {EMBEDDED}, not with {source.path}")
    chosen = next(known for known in FORMATS if known.name == name)
    if columns.named_columns(source):
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
    if columns.named_columns(source):
        return columns.NAME
    fitting = [known for known in FORMATS if known.recognises(found)]
    if len(fitting) > 1:
        raise DataError(
            f"the columns fit formats {' and '.join(known.name for known in fitting)}: set one, such as --set "
            f"{key}.format={fitting[0].name}. Columns found: {found}"
        )
    if not fitting:
        if columns.recognises(found):
            return columns.NAME
        raise DataError(f"no known format fits the {kind} data: {columns.naming(key, found)}. Columns found: {found}")
    mark, name = columns.safety_mark(found), fitting[0].name
    if kind == "forget" and mark is not None and not fitting[0].reads_marks:
        raise DataError(
            f"column {mark} seems to mark unsafe rows, and format {name} does not read it; set prompt_column, "
            f"answer_column, unsafe_column and unsafe_value of {key}, or --set {key}.format={name} to use every row"
        )
    return name
