"""CSV and JSON files, cell by cell as they are written.

These are not read through ``datasets``: it guesses types and so changes text. Measured on 5.2: the answers "007" and
"4" of a JSON column become 7 and 4 as soon as one answer is no text, "2020-01-01" becomes a time, "None" in a CSV
becomes null, and a CSV whose first row has a comma too many moves every cell one column on. Read here, a broken file
also names its line, and no copy of harmful text stays in a cache.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sku.data.sources.rows import Row
from sku.errors import DataError

DELIMITERS = {".csv": (",", ";", "\t"), ".tsv": ("\t", ";", ",")}
"""Suffix -> what may stand between two cells, the usual one first: where a comma is the sign of decimals Excel writes
semicolons, and calls that CSV too."""
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
SUFFIXES = (*DELIMITERS, *JSON_SUFFIXES)
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_UNPACKED_ANYWAY = 2**24
_NAMES = {",": "comma", ";": "semicolon", "\t": "tab"}
_LARGEST_RATIO = 200
"""Text packs to a third or a tenth, a very repetitive one to a fiftieth."""


def text_suffix(path: Path) -> str | None:
    """The suffix that says how to read a text file (``a.csv.gz`` is ``.csv``); None for other files."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _OPENERS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def read_text_file(path: Path) -> tuple[list[str], list[Row]]:
    """Reads a CSV, TSV, JSON or JSON Lines file in UTF-8, also with a byte order mark or packed by gzip or xz.

    Args:
        path: File with one of the suffixes above.

    Returns:
        Columns in order of appearance, and the rows; CSV cells are text, a JSON row without some key holds None there.

    Raises:
        DataError: The file can't be read or is broken, with the line.
    """
    suffix = text_suffix(path)
    assert suffix is not None
    try:
        text = _content(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.object[error.start]:#04x}): save it as UTF-8"
        ) from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path} can't be read: {error}") from None
    return _read_csv(text, path, DELIMITERS[suffix]) if suffix in DELIMITERS else _read_json(text, path)


def _content(path: Path) -> bytearray:
    """All of a file, unpacked up to a size that no text has: a bomb must not fill the memory."""
    suffix = path.suffix.lower()
    most = max(_UNPACKED_ANYWAY, _LARGEST_RATIO * path.stat().st_size)
    content = bytearray()
    with _OPENERS.get(suffix, open)(path, "rb") as file:
        while chunk := file.read(2**20):
            content += chunk
            if len(content) > most:
                raise DataError(
                    f"{path} unpacks to more than {_LARGEST_RATIO} times its size, which no text does: it looks "
                    "like a bomb; unpack it yourself if you trust it"
                )
    return content


def _read_csv(text: str, path: Path, delimiters: Sequence[str]) -> tuple[list[str], list[Row]]:
    """Reads with the delimiter that the header has most of, and where the rows don't fit it with the next one."""
    # A cell may hold 131,072 characters by default, a limit that the csv module keeps for the whole process.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        found = {delimiter: _cells_of_header(text, delimiter) for delimiter in delimiters}
        # Stable: of two that split the header alike the usual one comes first.
        likely = sorted((one for one in delimiters if found[one] > 1), key=lambda one: -found[one]) or delimiters[:1]
        errors: list[DataError] = []
        for delimiter in likely:
            try:
                return _read_cells(text, path, delimiter)
            except DataError as error:
                errors.append(error)
        raise errors[0]
    finally:
        csv.field_size_limit(limit)


def _cells_of_header(text: str, delimiter: str) -> int:
    try:
        return len(next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), []))
    except csv.Error:
        return 0


def _read_cells(text: str, path: Path, delimiter: str) -> tuple[list[str], list[Row]]:
    # newline="": the csv module finds line ends by itself, as they may stand inside a quoted cell.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    try:
        columns = next(reader, [])
        if not any(column.strip() for column in columns):
            raise DataError(f"{path} is empty: it needs a first line with the names of its columns")
        double = next((column for column in columns if columns.count(column) > 1), None)
        if double is not None:
            raise DataError(f"{path} has two columns named {double!r}: rename one")
        for cells in filter(None, reader):  # An empty line is no row.
            if len(cells) != len(columns):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells, but the header has {len(columns)}; "
                    f"is the file cut off, or does a cell with a {_NAMES[delimiter]} lack its quotes?"
                )
            rows.append(dict(zip(columns, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}; is a quote not closed?") from None
    return columns, rows


def _read_json(text: str, path: Path) -> tuple[list[str], list[Row]]:
    rows: list[Any]
    if text.lstrip().startswith("["):
        rows = _parse_json(text, path)
    else:
        lines = enumerate(io.StringIO(text, newline=""), start=1)
        rows = [_parse_json(line, path, number) for number, line in lines if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: {_EXPECTED}")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return columns, [{column: row.get(column) for column in columns} for row in rows]


_EXPECTED = "JSON data must be one object per line, or one list of objects"


def _parse_json(text: str, path: Path, first_line: int | None = None) -> Any:
    """A whole file, or its line of that number, which must be an object."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        line = (first_line or 1) + error.lineno - 1
        hint = f"{_EXPECTED}; is the file cut off?"
        raise DataError(f"{path}, line {line}, is not JSON ({error.msg}). {hint}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {first_line or 1}, can't be read as JSON: {error}") from None
    if first_line is not None and not isinstance(found, dict):
        raise DataError(f"{path}, line {first_line}: {_EXPECTED}")
    return found
