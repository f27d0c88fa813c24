"""From what ``data.*.path`` names, or a program holds, to rows: a file, a folder, a hub dataset, rows in memory.

CSV and JSON files are read cell by cell as they are written, not through ``datasets``: it guesses types and so changes
text. Measured on 5.2: the answers "007" and "4" of a JSON column become 7 and 4 as soon as one answer is no text,
"2020-01-01" becomes a time, "None" in a CSV becomes null, and a CSV whose first row has a comma too many moves every
cell one column on. Read here, a broken file also names its line, and no copy of harmful text stays in a cache.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from sku.config.data import EMBEDDED, SourceConfig
from sku.data.sources.rows import Columns, Row
from sku.errors import DataError, did_you_mean

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
PARQUET = ".parquet"
SHIPPED = "sku:"
"""What a path of prompts that ship with the package begins with: ``sku:normal``, ``sku:borderline``."""
NOT_WANTED = "another value than where asks for"
"""Reason counted for rows that ``where`` leaves out."""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of one source."""

    columns: tuple[str, ...]
    rows: Iterable[Row]
    revision: str | None = None
    """Commit of a hub dataset; nothing else has one."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Reason -> rows of the source that are not among ``rows``."""


@dataclass(frozen=True, kw_only=True)
class HeldRows(SourceConfig):
    """Rows in memory, with the settings of any other source."""

    table: Table


def held_rows(rows: object) -> HeldRows:
    """Takes rows that a program holds for a source.

    Args:
        rows: One split of a ``datasets.Dataset``; or a list with a dict a row, or with a conversation a row: a
            list of messages as chat templates take them.

    Returns:
        The source. A key that some dicts lack is an empty cell there.

    Raises:
        DataError: It is neither, holds several splits, or is a stream.
    """
    what, names = type(rows).__name__, getattr(rows, "column_names", None)
    if isinstance(rows, Mapping):
        raise DataError(f"data is a {what} of {len(rows)} splits: give one of them, such as dataset['train']")
    if isinstance(rows, list | tuple):
        found = [{"messages": row} if isinstance(row, list | tuple) else row for row in rows]
        odd = next((place for place, row in enumerate(found) if not isinstance(row, Mapping)), None)
        if odd is not None:
            raise DataError(f"row {odd} of the data is a {type(found[odd]).__name__}; it must be a dict or messages")
        names = list(dict.fromkeys(str(name) for row in found for name in row))
        table = Table(columns=tuple(names), rows=[{name: row.get(name) for name in names} for row in found])
        return HeldRows(path=f"{len(found)} rows in memory", table=table)
    if not isinstance(names, list) or not isinstance(rows, Iterable) or not isinstance(rows, Sized):
        raise DataError(f"data is a {what}; it must be a path, a datasets.Dataset (no stream), or a list of dicts")
    return HeldRows(path=f"{len(rows)} rows in memory", table=_table(rows))


def read_table(source: SourceConfig) -> Table:
    """Reads the rows that a source names; a file that changed is read anew each time.

    Args:
        source: ``path`` is a CSV, TSV, JSON, JSON Lines or Parquet file, a folder that ``datasets`` can load or has
            saved, a hub id, or ``sku:NAME`` for prompts that ship with the package. ``where`` says which of
            its rows are read.

    Returns:
        The table. Rows of text files hold cells as written; those of folders, Parquet files and the hub hold what
        ``datasets`` makes of them.

    Raises:
        DataError: It does not exist or can't be read, or has no such column as ``where`` names.
    """
    table = _read(source)
    return _only_wanted(table, source) if source.where else table


def _only_wanted(table: Table, source: SourceConfig) -> Table:
    columns, wanted = Columns(table.columns), source.wanted()
    columns.require(wanted, f"{source.path} has no column", ", which where names")
    kept: list[Row] = []
    count = 0
    for row in table.rows:
        count += 1
        if all(str(row[columns.written(name)]).strip().lower() in values for name, values in wanted.items()):
            kept.append(row)
    return dataclasses.replace(table, rows=kept, left_out={NOT_WANTED: count - len(kept)} if len(kept) < count else {})


def _read(source: SourceConfig) -> Table:
    if isinstance(source, HeldRows):
        return source.table
    if source.path.startswith(SHIPPED):
        return _read_shipped(source)
    if not source.path:
        raise DataError("a data path is empty: name a file, a folder or a hub dataset")
    try:
        path = Path(source.path).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError) as error:  # a name too long, a home of no user
        raise DataError(f"there is no file or folder {source.path} ({error})") from None
    if is_file:
        return _read_file(path, source)
    if is_folder:
        return _read_folder(path, source)
    if not is_hub_id(source):
        raise DataError(f"there is no file or folder {source.path} (looked in {Path.cwd()})")
    from sku.data.sources.hub import load_hub_dataset

    return _table(*load_hub_dataset(source))


def _read_shipped(source: SourceConfig) -> Table:
    _refuse(source, "revision", "config_name", "split", what=source.path)
    folder, name = resources.files("sku") / "prompts", source.path.removeprefix(SHIPPED)
    known = sorted(entry.name.removesuffix(".csv") for entry in folder.iterdir() if entry.name.endswith(".csv"))
    if name not in known:
        raise DataError(f"no {source.path} ships with SKU.{did_you_mean(name, known)} Known: {', '.join(known)}")
    with resources.as_file(folder / f"{name}.csv") as path:
        columns, rows = read_text_file(path)
        return Table(columns=tuple(columns), rows=list(rows))


def is_hub_id(source: SourceConfig) -> bool:
    """Whether a path names nothing on this machine and may be that of a hub dataset."""
    try:
        path = Path(source.path).expanduser()
        if source.path in ("", EMBEDDED) or path.exists():
            return False
    except (OSError, RuntimeError):
        return False
    named_as_file = path.suffix.lower() in (*SUFFIXES, PARQUET, ".gz", ".xz")
    return not named_as_file and _HUB_ID.fullmatch(source.path) is not None


def _read_file(path: Path, source: SourceConfig) -> Table:
    _refuse(source, "revision", "config_name", "split", what=f"the file {path}")
    stamp = path.stat()
    return _file_of(path.absolute(), (stamp.st_ino, stamp.st_mtime_ns, stamp.st_ctime_ns, stamp.st_size))


@lru_cache(maxsize=8)  # A command asks what a file holds before it loads it.
def _file_of(path: Path, _stamp: tuple[int, ...]) -> Table:
    if text_suffix(path) is not None:
        columns, rows = read_text_file(path)
        return Table(columns=tuple(columns), rows=rows)
    if path.suffix.lower() != PARQUET:
        raise DataError(f"{path} has no known file type; known: {', '.join((*SUFFIXES, PARQUET))}")
    from sku.data.sources.hub import load_files

    return _table(load_files("parquet", SourceConfig(path=str(path)), path))


def _read_folder(path: Path, source: SourceConfig) -> Table:
    from sku.data.sources.hub import load_files, load_saved

    _refuse(source, "revision", what=f"the folder {path}")
    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        # Resolved: datasets makes its cache folder's name of the last part, which may be "..".
        return _table(load_files(str(path.resolve()), source, path))
    _refuse(source, "config_name", what=f"the saved dataset {path}")
    saved = load_saved(path)
    if not isinstance(saved, dict):  # One split alone.
        _refuse(source, "split", what=f"the saved dataset {path}")
        return _table(saved)
    split = source.split or "train"
    if split not in saved:
        raise DataError(f"{path} has no split {split}: set split to one of {', '.join(saved)}")
    return _table(saved[split])


def _table(dataset: Any, revision: str | None = None) -> Table:
    return Table(columns=tuple(dataset.column_names), rows=dataset, revision=revision)


def _refuse(source: SourceConfig, *names: str, what: str) -> None:
    for name in names:
        value = getattr(source, name)
        if value is not None and (name, value) != ("split", "train"):
            raise DataError(f"{name} is {value!r}, but {what} has none: leave {name} empty")


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
