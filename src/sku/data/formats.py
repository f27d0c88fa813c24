"""The known formats, and how ``format: auto`` tells them apart."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from sku.config import EMBEDDED, SourceConfig
from sku.data import beavertails, columns, pku_saferlhf, trl_formats, truthfulqa
from sku.data.rows import Cells, Columns, Kind, RowParser
from sku.errors import DataError


@dataclass(frozen=True, kw_only=True)
class SourceFormat:
    """One known set of columns."""

    name: str
    recognises: Callable[[Collection[str]], bool]
    row_parser: Callable[[Collection[str]], RowParser]
    kinds: tuple[Kind, ...] = ("forget", "retain")
    """What its rows can be used for."""


FORMATS = (
    SourceFormat(
        name=pku_saferlhf.NAME,
        recognises=pku_saferlhf.recognises,
        row_parser=pku_saferlhf.row_parser,
        kinds=("forget",),
    ),
    SourceFormat(
        name=beavertails.NAME,
        recognises=beavertails.recognises,
        row_parser=beavertails.row_parser,
        kinds=("forget",),
    ),
    SourceFormat(
        name=truthfulqa.NAME,
        recognises=truthfulqa.recognises,
        row_parser=truthfulqa.row_parser,
        kinds=("retain",),
    ),
    SourceFormat(
        name=trl_formats.PROMPT_COMPLETION,
        recognises=trl_formats.recognises_prompt_completion,
        row_parser=trl_formats.prompt_completion_parser,
    ),
    SourceFormat(
        name=trl_formats.MESSAGES,
        recognises=trl_formats.recognises_messages,
        row_parser=trl_formats.messages_parser,
    ),
    SourceFormat(
        name=trl_formats.PREFERENCE,
        recognises=trl_formats.recognises_preference,
        row_parser=trl_formats.preference_parser,
        kinds=("forget",),
    ),
)
"""All formats with columns of their own; ``columns`` takes the rest."""
_BLIND_TO_MARKS = (trl_formats.PROMPT_COMPLETION, trl_formats.MESSAGES, trl_formats.PREFERENCE)
"""Formats that have no column for what is safe."""
HUB_LICENCES = {
    "pku-alignment/pku-saferlhf": pku_saferlhf.LICENCE,
    "pku-alignment/pku-saferlhf-qa": pku_saferlhf.LICENCE,
    "pku-alignment/beavertails": beavertails.LICENCE,
    "truthfulqa/truthful_qa": truthfulqa.LICENCE,
}
"""Lower-case hub id -> licence of that dataset. Anyone's table may have the same columns, and has another licence."""


def choose_parser(
    found: Collection[str], source: SourceConfig, kind: Kind, key: str | None = None
) -> tuple[str, RowParser]:
    """The reader of a table's rows, whose columns are compared without case.

    Args:
        found: Columns of the table.
        source: ``format`` as set, or ``auto``.
        kind: Whether the rows are to be forgotten or retained.
        key: The recipe's key that holds ``source``, for messages; ``data.<kind>`` if None.

    Returns:
        Name of the format, and the function from a row to its pairs.

    Raises:
        DataError: The columns don't fit the format, none or several fit, or the format can't serve as this kind.
    """
    named = Columns(found)
    name, parser = _chosen(named, source, kind, key or f"data.{kind}")
    return name, lambda row: parser(Cells(row, named))


def _chosen(found: Columns, source: SourceConfig, kind: Kind, key: str) -> tuple[str, RowParser]:
    name = detect_format(found, source, kind, key) if source.format == "auto" else source.format
    if name == columns.NAME:
        return name, columns.row_parser(found, source, kind, key)
    if name == EMBEDDED:
        raise DataError(f"format {EMBEDDED} goes with path {EMBEDDED}, not with {source.path}")
    chosen = next(known for known in FORMATS if known.name == name)
    if _has_named_columns(source):
        raise DataError(
            f"format {name} has its own columns: leave the *_column settings of {key} empty, or set "
            f"{key}.format=columns"
        )
    if kind not in chosen.kinds:
        raise DataError(f"format {name} gives {chosen.kinds[0]} examples only; for {kind} data use format columns")
    return name, chosen.row_parser(found)


def detect_format(found: Collection[str], source: SourceConfig, kind: Kind, key: str | None = None) -> str:
    """Tells the format by the names of the columns; named columns in ``source`` mean format ``columns``.

    Args:
        found: Columns of the table.
        source: Columns that are named.
        kind: Whether the rows are to be forgotten or retained.
        key: As in ``choose_parser``.

    Returns:
        Name of the format.

    Raises:
        DataError: None or several formats fit.
    """
    if _has_named_columns(source):
        return columns.NAME
    found, key = Columns(found), key or f"data.{kind}"
    fitting = [known.name for known in FORMATS if known.recognises(found)]
    listed = ", ".join(found) or "none"
    if len(fitting) > 1:
        raise DataError(
            f"the columns fit formats {' and '.join(fitting)}: set one, such as --set {key}.format={fitting[0]}. "
            f"Columns found: {listed}"
        )
    if fitting:
        _check_marks_are_read(found, fitting[0], kind, key)
        return fitting[0]
    if columns.recognises(found):
        return columns.NAME
    raise DataError(f"no known format fits the {kind} data: {columns.naming(key, found)}. Columns found: {listed}")


def _check_marks_are_read(found: Collection[str], name: str, kind: Kind, key: str) -> None:
    """Refuses to forget all rows of a table that tells safe ones from unsafe ones, unless its format was set."""
    mark = columns.safety_mark(found)
    if kind == "forget" and mark is not None and name in _BLIND_TO_MARKS:
        raise DataError(
            f"column {mark} seems to mark unsafe rows, and format {name} does not read it; set prompt_column, "
            f"answer_column, unsafe_column and unsafe_value of {key}, or --set {key}.format={name} to use every row"
        )


def _has_named_columns(source: SourceConfig) -> bool:
    named = (
        source.prompt_column,
        source.answer_column,
        source.safe_answer_column,
        source.category_column,
        source.unsafe_column,
    )
    return any(name is not None for name in named)
