"""Rows on disk: JSON Lines files that are whole, private and checked.

The first line of a file is its header: what the rows were made from. The same header means the same rows, so a
finished file is reused when a run goes on. Replies of a base model are harmful text: files get mode 0600.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

from sku.errors import EvaluationError, OutputError
from sku.evaluate.records import GenerationRecord
from sku.storage import write_private_text

SCHEMA_VERSION = 3
"""Of every file of an evaluation."""
GENERATIONS_FILE = "generations.jsonl"
PERPLEXITY_FILE = "perplexity.jsonl"
FLUENCY_FILE = "fluency.jsonl"
OUTCOMES_FILE = "outcomes.jsonl"
STARTS_FILE = "starts.jsonl"
OWN_ANSWERS_FILE = "own_answers.jsonl"
AGREEMENT_FILE = "agreement.jsonl"
SIMILARITY_FILE = "similarity.jsonl"
RELEVANCE_FILE = "relevance.jsonl"


class _Row(Protocol):
    @property
    def id(self) -> str: ...


Row = TypeVar("Row", bound=_Row)


def header_hash(header: Mapping[str, Any]) -> str:
    """SHA-256 of a header, independent of the order of its keys."""
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


def write_rows(path: Path, header: Mapping[str, Any], rows: Iterable[Any]) -> None:
    """Writes a header and one line per row.

    Args:
        path: File to write; what is there is replaced.
        header: What the rows were made from. ``schema_version`` and ``rows`` (their number) are added.
        rows: Dataclass instances.

    Raises:
        OutputError: The file can't be written.
    """
    plain = [dataclasses.asdict(row) for row in rows]
    lines = [{"schema_version": SCHEMA_VERSION, **header, "rows": len(plain)}, *plain]
    write_private_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


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
    """Builds one row and checks every field's presence and type.

    Raises:
        EvaluationError: A field is missing, unknown or of another type; with ``where``.
    """
    hints = typing.get_type_hints(row_type, include_extras=True)
    if content.keys() != hints.keys():
        wrong = sorted(content.keys() ^ hints.keys())
        raise EvaluationError(f"{where} has missing or unknown fields {', '.join(wrong)}: evaluate again")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
    for name, hint in hints.items():
        if not _fits(values[name], hint):
            raise EvaluationError(f"{where}: {name} is of the wrong type or has an unknown value: evaluate again")
    return row_type(**values)


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{where} is not JSON ({error.msg}): evaluate again") from None
    if not isinstance(content, dict):
        raise EvaluationError(f"{where} does not hold keys and values: evaluate again")
    return content


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Annotated:
        plain, *checks = typing.get_args(hint)
        return _fits(value, plain) and all(check(value) for check in checks)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # The latter where a Literal takes part.
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(entry, typing.get_args(hint)[0]) for entry in value)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint
