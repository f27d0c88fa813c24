"""From what ``data.*.path`` names, or a program holds, to rows: a file, a folder, a hub dataset, rows in memory.

CSV and JSON files are read cell by cell as they are written, not through ``datasets``: it guesses types and so changes
text. Measured on 5.2: the answers "007" and "4" of a JSON column become 7 and 4 as soon as one answer is no text,
"2020-01-01" becomes a time, "None" in a CSV becomes null, and a CSV whose first row has a comma too many moves every
cell one column on. pandas fills a row that is too short. Read here, a broken file also names its line, and no copy of
harmful text stays in a cache.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from sku.config.data import EMBEDDED, SourceConfig
from sku.data.rows import Row, plain_name, require
from sku.errors import DataError, did_you_mean, one_line

DELIMITERS = {".csv": ",;\t", ".tsv": "\t;,"}
"""Suffix -> what may stand between two cells, the usual one first: where a comma is the sign of decimals Excel writes
semicolons, and calls that CSV too. The header line says which, by what it has most of."""
SUFFIXES = (*DELIMITERS, ".json", ".jsonl", ".ndjson")
PARQUET = ".parquet"
SHIPPED = "sku:"
"""What a path of prompts that ship with the package begins with: ``sku:normal``, ``sku:borderline``."""
NOT_WANTED = "another value than where asks for"
"""Reason counted for rows that ``where`` leaves out."""
_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
csv.field_size_limit(sys.maxsize)  # A cell may hold 131,072 characters by default.


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of one source."""

    columns: Mapping[str, str]
    """Plain name (``plain_name``) -> as written."""
    rows: Collection[Row]
    """By plain names."""
    revision: str | None = None
    """Commit of a hub dataset; nothing else has one."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Reason -> rows of the source that are not among ``rows``."""


@dataclass(frozen=True, kw_only=True)
class HeldRows(SourceConfig):
    """Rows in memory, with the settings of any other source."""

    table: Table


def held_rows(rows: Any) -> HeldRows:
    """Takes rows that a program holds for a source: a split of a ``datasets.Dataset``, dicts, or conversations.

    A key that some dicts lack is an empty cell there.

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
        table = _table_of_dicts(found, "the data")
    elif isinstance(names, list) and isinstance(rows, Sized):
        table = _table(rows)
    else:
        raise DataError(f"data is a {what}; it must be a path, a datasets.Dataset (no stream), or a list of dicts")
    return HeldRows(path=f"{len(rows)} rows in memory", table=table)


def read_table(source: SourceConfig) -> Table:
    """Reads the rows that a source names; a file that changed is read anew each time.

    ``path`` is a CSV, TSV, JSON, JSON Lines or Parquet file, a folder that ``datasets`` can load or has saved, a hub
    id, or ``sku:NAME`` for prompts that ship with the package. Rows of text files hold cells as written; the others
    what ``datasets`` makes of them. ``where`` says which rows are read.

    Raises:
        DataError: It does not exist or can't be read, or has no such column as ``where`` names.
    """
    table = _read(source)
    if not source.where:
        return table
    wanted = source.wanted()
    require(table.columns, wanted, f"{source.path} has no column", ", which where names")
    kept = [
        row for row in table.rows if all(str(row[name]).strip().lower() in values for name, values in wanted.items())
    ]
    dropped = len(table.rows) - len(kept)
    return replace(table, rows=kept, left_out={NOT_WANTED: dropped} if dropped else {})


def _read(source: SourceConfig) -> Table:
    if isinstance(source, HeldRows):
        return source.table
    if source.path.startswith(SHIPPED):
        return _read_shipped(source)
    path = _existing(source.path)
    if path is not None and path.is_file():
        _refuse(source, "revision", "config_name", "split", what=f"the file {path}")
        stamp = path.stat()
        return _file_of(path.absolute(), (stamp.st_ino, stamp.st_mtime_ns, stamp.st_ctime_ns, stamp.st_size))
    if path is not None and path.is_dir():
        return _read_folder(path, source)
    if not is_hub_id(source):
        raise DataError(f"there is no file or folder {source.path or 'without a name'} (looked in {Path.cwd()})")
    return _read_from_hub(source)


def _existing(name: str) -> Path | None:
    """What a path names on this machine."""
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, RuntimeError):  # a name too long, a home of no user
        return None


def is_hub_id(source: SourceConfig) -> bool:
    """Whether a path names nothing on this machine and may be that of a hub dataset."""
    named_as_file = Path(source.path).suffix.lower() in (*SUFFIXES, PARQUET)
    is_id = source.path != EMBEDDED and not named_as_file and _HUB_ID.fullmatch(source.path) is not None
    return is_id and _existing(source.path) is None


def _read_shipped(source: SourceConfig) -> Table:
    _refuse(source, "revision", "config_name", "split", what=source.path)
    folder, name = resources.files("sku") / "prompts", source.path.removeprefix(SHIPPED)
    known = sorted(entry.name.removesuffix(".csv") for entry in folder.iterdir() if entry.name.endswith(".csv"))
    if name not in known:
        raise DataError(f"no {source.path} ships with SKU.{did_you_mean(name, known)} Known: {', '.join(known)}")
    with resources.as_file(folder / f"{name}.csv") as path:
        return read_text_file(path)


@lru_cache(maxsize=8)  # A command asks what a file holds before it loads it.
def _file_of(path: Path, _stamp: tuple[int, ...]) -> Table:
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return read_text_file(path)
    if suffix != PARQUET:
        raise DataError(f"{path} has no known file type; known: {', '.join((*SUFFIXES, PARQUET))}")
    return _load_files("parquet", SourceConfig(path=str(path)), path)


def _read_folder(path: Path, source: SourceConfig) -> Table:
    _refuse(source, "revision", what=f"the folder {path}")
    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        # Resolved: datasets makes its cache folder's name of the last part, which may be "..".
        return _load_files(str(path.resolve()), source, path)
    _refuse(source, "config_name", what=f"the saved dataset {path}")
    saved = _by_datasets(str(path), lambda datasets: datasets.load_from_disk(str(path), keep_in_memory=True))
    if not isinstance(saved, dict):  # One split alone.
        _refuse(source, "split", what=f"the saved dataset {path}")
        return _table(saved)
    split = source.split or "train"
    if split not in saved:
        raise DataError(f"{path} has no split {split}: set split to one of {', '.join(saved)}")
    return _table(saved[split])


def _table(dataset: Any, revision: str | None = None) -> Table:
    columns = _plain_names(dataset.column_names, "the data")
    changed = {own: name for name, own in columns.items() if own != name}
    return Table(columns=columns, rows=dataset.rename_columns(changed) if changed else dataset, revision=revision)


def _table_of_dicts(rows: Sequence[Row], what: object) -> Table:
    columns = _plain_names(dict.fromkeys(str(name) for row in rows for name in row), what)
    return Table(columns=columns, rows=[{name: row.get(own) for name, own in columns.items()} for row in rows])


def _plain_names(names: Iterable[str], what: object) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        if plain_name(name) in found:
            raise DataError(f"{what} has two columns named {name!r}, case aside: rename one")
        found[plain_name(name)] = name
    return found


def _refuse(source: SourceConfig, *names: str, what: str) -> None:
    for name in names:
        value = getattr(source, name)
        if value is not None and (name, value) != ("split", "train"):
            raise DataError(f"{name} is {value!r}, but {what} has none: leave {name} empty")


def read_text_file(path: Path) -> Table:
    """Reads a CSV, TSV, JSON or JSON Lines file in UTF-8, also with a byte order mark.

    Columns are in order of appearance; CSV cells are text, a JSON row without some key holds None there.

    Raises:
        DataError: The file can't be read or is broken, with the line.
    """
    try:
        # Decoded as a whole: text mode would change line ends inside cells.
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"{path} is not UTF-8 text (byte {byte:#04x}): save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path} can't be read: {error}") from None
    delimiters = DELIMITERS.get(path.suffix.lower())
    return _read_json(text, path) if delimiters is None else _read_csv(text, path, delimiters)


def _read_csv(text: str, path: Path, delimiters: str) -> Table:
    delimiter = max(delimiters, key=text.partition("\n")[0].count)
    # newline="": the csv module finds line ends by itself, as they may stand inside a quoted cell.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    try:
        header = next(reader, [])
        if not any(column.strip() for column in header):
            raise DataError(f"{path} is empty: it needs a first line with the names of its columns")
        columns = _plain_names(header, path)
        for cells in filter(None, reader):  # An empty line is no row.
            if len(cells) != len(columns):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells, but the header has {len(columns)}; "
                    f"is the file cut off, or does a cell with a {delimiter!r} lack its quotes?"
                )
            rows.append(dict(zip(columns, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}; is a quote not closed?") from None
    return Table(columns=columns, rows=rows)


def _read_json(text: str, path: Path) -> Table:
    if text.lstrip().startswith("["):
        rows = {str(path): _parse_json(text, path, 1)}
    else:
        lines = enumerate(io.StringIO(text, newline=""), start=1)
        rows = {f"{path}, line {number}": [_parse_json(line, path, number)] for number, line in lines if line.strip()}
    odd = next((place for place, found in rows.items() if not all(isinstance(row, dict) for row in found)), None)
    if odd is not None:
        raise DataError(f"{odd}: {_EXPECTED}")
    return _table_of_dicts([row for found in rows.values() for row in found], path)


_EXPECTED = "JSON data must be one object per line, or one list of objects"


def _parse_json(text: str, path: Path, first_line: int) -> Any:
    """What begins at a line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{path}, line {line}, is not JSON ({error.msg}). {_EXPECTED}; is the file cut off?") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {first_line}, can't be read as JSON: {error}") from None


def _load_files(builder: str, source: SourceConfig, path: Path) -> Table:
    """Reads a Parquet file (``builder`` parquet), or a folder laid out as a hub repository (its own builder)."""
    # A cache of its own, dropped at once: the shared one keeps harmful text and tells a changed file only by its time.
    with tempfile.TemporaryDirectory(prefix="sku-") as cache:
        options = {"data_files": str(path) if path.is_file() else None, "cache_dir": cache, "keep_in_memory": True}
        split = source.split or "train"
        load = lambda datasets: datasets.load_dataset(builder, source.config_name, split=split, **options)  # noqa: E731
        return _table(_by_datasets(str(path), load))


def _commit_on_hub(source: SourceConfig) -> str | None:
    """The commit of a branch or tag; None where the hub is out of reach: a copy on this machine may do."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    # The base is ``HTTPError`` of the HTTP library below the hub's client, which is httpx or httpx2 by version.
    http_error: Any = HfHubHTTPError.__mro__[1]
    try:
        return HfApi().dataset_info(source.path, revision=source.revision).sha
    except (HfHubHTTPError, HFValidationError) as error:
        raise DataError(
            f"there is no file or folder {source.path}, and the hub gives no dataset of that name at revision "
            f"{source.revision or 'main'}: {one_line(error)}"
        ) from None
    except (OfflineModeIsEnabled, ConnectionError, http_error):
        return None


def _read_from_hub(source: SourceConfig) -> Table:
    """Downloads a split of a hub dataset at one commit, or takes the copy on this machine.

    Raises:
        DataError: No such dataset, configuration or split, or the copy here is of another commit than was asked for.
    """
    wanted = _commit_on_hub(source) or source.revision
    dataset = _by_datasets(
        f"{source.path} is no file or folder here, and the hub dataset of that name",
        lambda datasets: datasets.load_dataset(
            source.path, source.config_name, revision=wanted, split=source.split or "train"
        ),
    )
    # Where the hub fails, datasets takes the newest copy on this machine, whatever revision was asked for. Its files
    # lie in ``<id>/<configuration>/<version>/<commit>/``.
    folders = (Path(entry["filename"]).parent.name for entry in dataset.cache_files)
    found = next(filter(_COMMIT.fullmatch, folders), wanted)
    if found is None or not _COMMIT.fullmatch(found) or wanted not in (None, found):
        raise DataError(
            f"{source.path} was asked for at {wanted or 'the newest commit'}, but the hub can't be reached and "
            f"this machine holds {found or 'an unknown commit'}: go online, or set revision to that commit"
        )
    return _table(dataset, found)


def _by_datasets(what: str, read: Callable[[Any], Any]) -> Any:
    """Reads by ``datasets``, imported only here as it takes a second or two; one line for its many exceptions."""
    import datasets

    try:
        return read(datasets)
    except Exception as error:  # noqa: BLE001 - datasets, httpx and pyarrow share no base class
        cause: BaseException = error
        while cause.__cause__ is not None:  # The first cause is the one that says something.
            cause = cause.__cause__
        first, last = one_line(error), one_line(cause)
        more = f" ({last})" if last not in first else ""
        raise DataError(f"{what} can't be read: {first}{more}") from None
