"""From what ``data.*.path`` names, or a program holds, to rows: a file, a folder, a hub dataset, rows in memory."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from sku.config import EMBEDDED, SourceConfig
from sku.data.sources.rows import Columns, Row
from sku.data.sources.text_files import SUFFIXES, read_text_file, text_suffix
from sku.errors import DataError, did_you_mean

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
    if text_suffix(path) is not None:
        columns, rows = read_text_file(path)
        return Table(columns=tuple(columns), rows=rows)
    if path.suffix.lower() != PARQUET:
        raise DataError(f"{path} has no known file type; known: {', '.join((*SUFFIXES, PARQUET))}")
    from sku.data.sources.hub import load_files

    return _table(load_files("parquet", source, path))


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
