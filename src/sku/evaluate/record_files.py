"""Rows on disk: JSON Lines files that are whole, private and checked.

The first line of a file is its header: what the rows were made from. The same header means the same rows, so a
finished file is reused when a run goes on. Replies of a base model are harmful text: files get mode 0600.

Rows on their way to a finished file are appended to a partial one as they come, so that a killed run loses one batch
and no more. It lies beside the finished one as ``.NAME.partial``, with mode 0600 and the same header, and goes when
the finished one stands. Its last line may be torn; what stands after the first broken line is dropped.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar, cast

from sku.config.check import plain_data
from sku.errors import EvaluationError, OutputError
from sku.evaluate.records import GenerationRecord
from sku.storage import named_disk_errors, write_private_text

if TYPE_CHECKING:
    from sku.processes import Processes

SCHEMA_VERSION = 5
"""Of every file of an evaluation."""
GENERATIONS_FILE = "generations.jsonl"
PERPLEXITY_FILE = "perplexity.jsonl"
FLUENCY_FILE = "fluency.jsonl"
OUTCOMES_FILE = "outcomes.jsonl"
STARTS_FILE = "starts.jsonl"
OWN_ANSWERS_FILE = "own_answers.jsonl"
AGREEMENT_FILE = "agreement.jsonl"
SIMILARITY_FILE = "similarity.jsonl"


class _Row(Protocol):
    @property
    def id(self) -> str: ...


Row = TypeVar("Row", bound=_Row)
T = TypeVar("T")


def header_hash(header: Mapping[str, Any] | Sequence[Any]) -> str:
    """SHA-256 of a header or of other plain data, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def create_private_folder(folder: Path) -> None:
    """Makes a folder with mode 0700; one that is already there keeps its mode.

    Raises:
        OutputError: It can't be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"folder {folder} can't be made: {error.strerror}") from None


def write_json_object(path: Path, content: Mapping[str, Any]) -> None:
    """Writes keys and values for people to read too.

    Raises:
        OutputError: As ``write_private_text``.
    """
    write_private_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """Reads what ``write_json_object`` wrote.

    Args:
        path: The file.
        remedy: What a user can do where it holds something else.

    Raises:
        EvaluationError: The file is missing or broken.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EvaluationError(f"{path} can't be read: {error}") from None
    if not isinstance(content, dict):
        raise EvaluationError(f"{path} does not hold keys and values: {remedy}")
    return content


def check_schema(content: Mapping[str, Any], version: int, where: str, remedy: str = "evaluate again") -> None:
    """Refuses what another version of SKU wrote.

    Args:
        content: Its ``schema_version`` is looked at.
        version: What is read here.
        where: File, or place in one, for the message.
        remedy: What a user can do.

    Raises:
        EvaluationError: Another schema version, or none.
    """
    found = content.get("schema_version")
    if found != version:
        raise EvaluationError(f"{where} has schema version {found}, this SKU reads {version}: {remedy}")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A dataclass that stands in one JSON file of a folder, its fields beside ``schema_version``."""

    FILE: ClassVar[str]
    SCHEMA: ClassVar[int]
    AGAIN: ClassVar[str] = "evaluate again"
    """What a user can do where the file doesn't fit."""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"schema_version": self.SCHEMA, **plain_data(self)}

    @classmethod
    def from_dict(cls, content: Any, where: str = "") -> Self:
        """The inverse of ``to_dict``.

        Raises:
            EvaluationError: Another schema version, or keys that don't fit it; with ``where``.
        """
        return from_plain(cls, content, where or cls.FILE, cls.AGAIN, version=cls.SCHEMA)

    def write(self, folder: Path) -> None:
        """Writes the file.

        Raises:
            OutputError: The folder can't be written.
        """
        write_json_object(folder / self.FILE, self.to_dict())

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads the file.

        Raises:
            EvaluationError: It is missing or broken.
        """
        path = folder / cls.FILE
        return cls.from_dict(read_json_object(path, cls.AGAIN), str(path))


def json_lines(contents: Iterable[Any]) -> str:
    """One line for each: a dict, or a dataclass instance."""
    plain = (content if isinstance(content, dict) else dataclasses.asdict(content) for content in contents)
    return "".join(json.dumps(content, ensure_ascii=False) + "\n" for content in plain)


def write_rows(path: Path, header: Mapping[str, Any], rows: Iterable[Any]) -> None:
    """Writes a header and one line per row.

    Args:
        path: File to write; what is there is replaced.
        header: What the rows were made from. ``schema_version`` and ``rows`` (their number) are added.
        rows: Dataclass instances.

    Raises:
        OutputError: The file can't be written.
    """
    listed = list(rows)
    write_private_text(path, json_lines([{"schema_version": SCHEMA_VERSION, **header, "rows": len(listed)}, *listed]))


def read_rows(path: Path, row_type: type[Row]) -> tuple[dict[str, Any], list[Row]]:
    """Reads and checks what ``write_rows`` wrote.

    Args:
        path: The file.
        row_type: Dataclass of its rows.

    Returns:
        The header as it was given to ``write_rows``, and the rows in order.

    Raises:
        EvaluationError: No such file, another schema, a broken, missing or doubled row; with the line number.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogatepass").split("\n")
    except FileNotFoundError:
        raise EvaluationError(
            f"there is no {path}: it was removed (sku wipe --replies) or never written; evaluate again"
        ) from None
    except (OSError, UnicodeError) as error:
        raise EvaluationError(f"{path} can't be read: {error}") from None
    if lines.pop():
        raise EvaluationError(f"{path} line {len(lines) + 1} breaks off: the file is incomplete, evaluate again")
    parsed = [_parse_line(line, f"{path} line {number}") for number, line in enumerate(lines, start=1)]
    header = parsed[0] if parsed else {}
    check_schema(header, SCHEMA_VERSION, f"{path} line 1")
    rows = [
        row_from_dict(row_type, content, f"{path} line {number}") for number, content in enumerate(parsed[1:], start=2)
    ]
    if header.get("rows") != len(rows):
        raise EvaluationError(f"{path} holds {len(rows)} rows, its header says {header.get('rows')}: evaluate again")
    seen: set[str] = set()
    for number, row in enumerate(rows, start=2):
        if row.id in seen:
            raise EvaluationError(f"{path} line {number} repeats the id {row.id}: evaluate again")
        seen.add(row.id)
    del header["schema_version"], header["rows"]
    return header, rows


def read_if_same(path: Path, header: Mapping[str, Any], row_type: type[Row]) -> list[Row] | None:
    """The rows of a finished file that was made from the same things, else None: they must be made anew."""
    try:
        found, rows = read_rows(path, row_type)
    except EvaluationError:
        return None
    return rows if header_hash(found) == header_hash(header) else None


def read_generations(path: Path) -> tuple[dict[str, Any], list[GenerationRecord]]:
    """Reads a ``generations.jsonl``: its header and its records.

    Raises:
        EvaluationError: As ``read_rows``.
    """
    return read_rows(path, GenerationRecord)


def row_from_dict(row_type: type[Row], content: Mapping[str, Any], where: str) -> Row:
    """Builds one row, every field of which must be there.

    Raises:
        EvaluationError: A field is missing, unknown or of another type; with ``where``.
    """
    try:
        if wrong := sorted(content.keys() ^ _fields(row_type)[0].keys()):
            raise _MisfitError(f"it has missing or unknown fields {', '.join(wrong)}")
        return cast(Row, _built(row_type, content, ""))
    except _MisfitError as misfit:
        raise EvaluationError(f"{where}: {misfit}: evaluate again") from None


def from_plain(
    kind: type[T], content: Any, where: str, remedy: str = "evaluate again", *, version: int | None = None
) -> T:
    """The inverse of ``dataclasses.asdict`` after JSON: a dataclass with all that it holds, by its annotations.

    Args:
        kind: A dataclass. Fields that have a default may be missing.
        content: What JSON held.
        where: File, or place in one, for the message.
        remedy: What a user can do.
        version: What ``schema_version`` beside the fields must be; there is none where this is None.

    Raises:
        EvaluationError: Another version, or a field is missing, unknown or of another type; in one line.
    """
    if version is not None:
        if not isinstance(content, Mapping):
            raise EvaluationError(f"{where} does not hold keys and values: {remedy}")
        check_schema(content, version, where, remedy)
        content = {name: value for name, value in content.items() if name != "schema_version"}
    try:
        return cast(T, _built(kind, content, ""))
    except _MisfitError as misfit:
        raise EvaluationError(f"{where} doesn't fit its schema: {misfit}: {remedy}") from None
    except EvaluationError as error:  # Of a dataclass that checks itself.
        raise EvaluationError(f"{where}: {error}") from None


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{where} is not JSON ({error.msg}): evaluate again") from None
    if not isinstance(content, dict):
        raise EvaluationError(f"{where} does not hold keys and values: evaluate again")
    return content


class _MisfitError(Exception):
    """What does not fit."""


@functools.cache
def _fields(kind: type) -> tuple[dict[str, Any], frozenset[str]]:
    """Name -> annotated type, and the names of those without a default."""
    fields, hints = dataclasses.fields(kind), typing.get_type_hints(kind, include_extras=True)
    needed = [
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    return {field.name: hints[field.name] for field in fields}, frozenset(needed)


def _built(hint: Any, value: Any, name: str) -> Any:
    """A value of an annotated type from plain data; ``name`` is its place, for messages.

    Not by pydantic: replies hold lone surrogates, which its strict JSON mode refuses; its other mode takes "3" for 3.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or type(value) is hint or (hint is float and type(value) is int):
        return value
    if dataclasses.is_dataclass(hint):
        return _built_dataclass(cast(type, hint), value, name)
    if origin is Annotated:
        found = _built(inner[0], value, name)
        if all(check(found) for check in inner[1:] if callable(check)):
            return found
    elif origin in (types.UnionType, typing.Union):  # The latter where a Literal takes part.
        for option in inner[1:]:
            with suppress(_MisfitError):
                return _built(option, value, name)
        return _built(inner[0], value, name)  # The last, for it says what does not fit.
    elif origin is tuple and isinstance(value, list | tuple):
        return tuple(_built(inner[0], entry, f"{name}[{place}]") for place, entry in enumerate(value))
    elif origin in (Mapping, dict) and isinstance(value, Mapping):
        return _built_mapping(inner[0], inner[1], value, name)
    elif origin is Literal and value in inner:
        return value
    raise _misfit(name)


def _misfit(name: str) -> _MisfitError:
    return _MisfitError(f"{name} is of the wrong type or has an unknown value")


def _built_mapping(key: Any, kind: Any, value: Mapping[str, Any], name: str) -> dict[Any, Any]:
    if key is int and not all(word.isdecimal() for word in value):  # JSON has no keys but words.
        raise _misfit(name)
    return {int(word) if key is int else word: _built(kind, entry, f"{name}.{word}") for word, entry in value.items()}


def _built_dataclass(kind: type, value: Any, name: str) -> Any:
    if not isinstance(value, Mapping):
        raise _MisfitError(f"{name or 'it'} does not hold keys and values")
    hints, needed = _fields(kind)
    if wrong := sorted(map(str, {*(value.keys() - hints.keys()), *(needed - value.keys())})):
        raise _MisfitError(f"{name or 'it'} has missing or unknown fields {', '.join(wrong)}")
    prefix = f"{name}." if name else ""
    return kind(**{field: _built(hints[field], entry, f"{prefix}{field}") for field, entry in value.items()})


class PartialFile(Generic[Row]):
    """The partial file of one finished file."""

    def __init__(self, path: Path, header: Mapping[str, Any], row_type: type[Row]) -> None:
        """Touches nothing yet.

        Args:
            path: The finished file.
            header: What its rows are made from: rows under another header are of no use.
            row_type: Dataclass of the rows.
        """
        self.path = path.with_name(f".{path.name}.partial")
        self._header = {"schema_version": SCHEMA_VERSION, **header}
        self._row_type = row_type

    def recover(self) -> list[Row]:
        """The rows of an interrupted run; the file is cut to them, or begun anew where it is of something else.

        Raises:
            OutputError: It can't be written.
        """
        rows = self._whole_rows()
        write_private_text(self.path, json_lines([self._header, *rows]))
        return list({row.id: row for row in rows}.values())

    def append(self, rows: Sequence[Row]) -> None:
        """Adds rows and waits until the disk has them.

        Raises:
            OutputError: The disk is full, or the file is gone.
        """
        with (
            named_disk_errors(self.path),
            self.path.open("a", encoding="utf-8", errors="surrogatepass", newline="\n") as file,
        ):
            file.write(json_lines(rows))
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Removes it: the finished file has all its rows."""
        self.path.unlink(missing_ok=True)

    def _whole_rows(self) -> list[Row]:
        try:
            lines = self.path.read_text(encoding="utf-8", errors="surrogatepass").split("\n")[:-1]
            if not lines or header_hash(json.loads(lines[0])) != header_hash(self._header):
                return []
        except (OSError, ValueError):
            return []
        rows: list[Row] = []
        for line in lines[1:]:
            try:
                rows.append(row_from_dict(self._row_type, json.loads(line), str(self.path)))
            except (ValueError, AttributeError, EvaluationError):
                break
        return rows


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """The files of one evaluation."""

    folder: Path | None
    """Nothing is read or written without one."""
    processes: Processes

    def rows(
        self, file: str, header: Mapping[str, Any], row_type: type[Row], make: Callable[[], list[Row]]
    ) -> list[Row]:
        """The rows of a file.

        Args:
            file: Its name.
            header: What its rows are made from.
            row_type: Of the rows.
            make: Called in every process where the file does not hold them; gives all rows in each.

        Returns:
            The rows, in every process.

        Raises:
            OutputError: The file can't be written.
        """
        folder = self.folder
        if folder is None:
            return make()
        rows = self.processes.run_on_rank0(lambda: read_if_same(folder / file, header, row_type))
        if rows is None:
            rows = make()
            self.write(file, header, rows)
        self.close(file, header, row_type)
        return rows

    def write(self, file: str, header: Mapping[str, Any], rows: Sequence[Any]) -> None:
        """Writes a finished file."""
        folder = self.folder
        if folder is not None:
            self.processes.run_on_rank0(lambda: write_rows(folder / file, header, rows))

    def saved(self, file: str, header: Mapping[str, Any], row_type: type[Row]) -> dict[str, Any]:
        """Options of ``generate_replies``: the rows of an interrupted run, and what keeps those of each batch."""
        if self.folder is None:
            return {}
        partial = PartialFile(self.folder / file, header, row_type)
        return {"finished": self.processes.run_on_rank0(partial.recover), "keep": partial.append}

    def close(self, file: str, header: Mapping[str, Any], row_type: type[Row]) -> None:
        """Removes the partial file."""
        if self.folder is not None and self.processes.is_main:
            PartialFile(self.folder / file, header, row_type).remove()

    def rows_of_main(
        self, file: str, header: Mapping[str, Any], row_type: type[Row], make: Callable[[], list[Row]]
    ) -> list[Row]:
        """As ``rows``, for work that is not shared: only the main process does it, the others wait."""
        return self.rows(file, header, row_type, lambda: self.processes.run_on_rank0(make))
