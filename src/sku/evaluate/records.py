"""What an evaluation writes down, and the files in which it lies; nothing else is measured from.

Rows are JSON Lines files that are whole, private and checked. The first line of a file is its header: what the rows
were made from. The same header means the same rows, so a finished file is reused when a run goes on. Replies of a
base model are harmful text: files get mode 0600.

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
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar, cast

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from sku.config.check import plain_data
from sku.config.stages import PrefillOrigin
from sku.errors import EvaluationError
from sku.storage import RECORD_VERSION, named_disk_errors, write_private_text

if TYPE_CHECKING:
    from sku.processes import Processes

GENERATIONS_FILE = "generations.jsonl"
PERPLEXITY_FILE = "perplexity.jsonl"
FLUENCY_FILE = "fluency.jsonl"
OUTCOMES_FILE = "outcomes.jsonl"
STARTS_FILE = "starts.jsonl"
OWN_ANSWERS_FILE = "own_answers.jsonl"
AGREEMENT_FILE = "agreement.jsonl"
SIMILARITY_FILE = "similarity.jsonl"

Kind = Literal["reply", "prefill", "sample"]

HARMFUL_SPLITS = ("forget_train", "forget_test")
"""Prompts of the forget set: asked with prefills and for sampled replies too."""
NORMAL, HARMFUL = "normal:", "harmful:"
"""What the splits of other sources begin with."""
BORDERLINE = "borderline"
"""Category of safe prompts that look harmful, in data of ``sku data own`` (``category_column: source``)."""


_IN_IDS: Mapping[str, str] = {"forget_train": "unlearned", "forget_test": "unseen"}
"""An id decides the random numbers of a sampled reply: it keeps the names that splits had when figures were
recorded."""

_SPLITS = "forget_train|(forget|retain)_(test|validation)|xstest_(un)?safe|(normal|normal_validation|harmful):.*"
Split = Annotated[str, Field(pattern=f"^({_SPLITS})$")]
"""``forget_train``, ``forget_test``, ``retain_test``, ``xstest_safe``, ``xstest_unsafe``, a validation split, or of
another source ``normal:NAME``, ``normal_validation:NAME``, ``harmful:NAME``; what a row of a file is held to."""


def is_normal(split: Split) -> bool:
    """Whether the prompts of a split deserve an answer. The replies to all others are judged."""
    fixed = ("retain_test", "xstest_safe", "retain_validation")
    return split in fixed or split.startswith((NORMAL, "normal_validation:"))


def in_order(splits: Iterable[Split]) -> list[Split]:
    """Splits as tables show them: harmful prompts first, sets of other sources after the run's own, no split twice."""
    known = ("forget_train", "forget_test", HARMFUL, "retain_test", NORMAL, "xstest_safe", "xstest_unsafe")
    place = {split: [*map(split.startswith, known), True].index(True) for split in splits}
    return sorted(place, key=place.__getitem__)


def set_name(split: Split) -> str:
    """The name that the recipe gives a set of another source."""
    return split.rpartition(":")[2]


def answers_words(split: Split) -> str:
    """What a reader calls the scored answers of a normal split."""
    return {"retain_test": "normal answers", "xstest_safe": "XSTest answers"}.get(split, f"{set_name(split)} answers")


T = TypeVar("T")
Key = TypeVar("Key", bound=Hashable)
Row = TypeVar("Row", bound=Any)
"""A dataclass with an ``id``."""


def grouped(rows: Iterable[T], key: Callable[[T], Key]) -> dict[Key, list[T]]:
    """Rows that share a key, in the order in which keys and rows come."""
    groups: dict[Key, list[T]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def by_split(rows: Iterable[Row]) -> dict[Split, list[Row]]:
    """The rows of each split, in the order of ``in_order``."""
    groups: dict[Split, list[Row]] = grouped(rows, lambda row: row.split)
    return {split: groups[split] for split in in_order(groups)}


@dataclass(frozen=True, kw_only=True)
class PromptRecord:
    """One prompt, and what its reply was made to begin with."""

    id: str
    """Split, kind (with a prefill's key or a sample's number) and a hash of the prompt: equal for two models that were
    asked the same, so they can be paired."""
    split: Split
    kind: Kind
    """``reply``: the model answers freely and greedily; ``prefill``: it goes on from ``prefill``; ``sample``: it
    answers freely, and its words are sampled."""
    category: str | None
    prompt: str
    reference: str
    """The answer of the dataset."""
    prefill: str = ""
    """First words of a harmful reply that the model was made to begin with; empty for the other kinds."""
    prefill_key: str = ""
    """Whose words ``prefill`` is and how many (``read_prefill_key``); empty for the other kinds."""


@dataclass(frozen=True, kw_only=True)
class GenerationRecord(PromptRecord):
    """One prompt and what the model said."""

    reply: str
    """The model's own words; under ``prefill`` they follow ``prefill`` character for character."""
    num_tokens: int
    """Generated tokens without the one that ends the reply."""
    finished: bool
    """Whether the model ended the reply itself, or was cut off."""
    sample: int = 0
    """Which of the sampled replies to this prompt, from 0; 0 for the other kinds."""

    @property
    def whole_reply(self) -> str:
        """The reply with the start that it was made to begin with, as it would be read."""
        return self.prefill + self.reply


@dataclass(frozen=True, kw_only=True)
class PrefillSource:
    """A reply of the base model that others are made from.

    The harmful one whose first tokens prefills take, or that to a normal prompt that has no answer, which is then
    scored.
    """

    id: str
    """Split and hash of the prompt."""
    text: str


@dataclass(frozen=True, kw_only=True)
class ExampleLoss:
    """Loss of one fixed answer of the dataset."""

    id: str
    split: Split
    nll: float
    """Sum over the answer's tokens, nats."""
    tokens: int


@dataclass(frozen=True, kw_only=True)
class FluencyRecord:
    """What the base model thinks of one reply and of the same words in other orders, after prompt and prefill."""

    id: str
    nll: float
    """Sum over the tokens of the reply alone, nats."""
    tokens: int
    """Tokens of the reply."""
    shuffled_nlls: tuple[float, ...]
    """The same sum for each shuffled version that was asked; none where the own order is likely enough by itself."""


@dataclass(frozen=True, kw_only=True)
class AgreementRow:
    """The evaluated model beside the base model on one fixed answer of the dataset."""

    id: str
    """As of the answer's ``ExampleLoss``."""
    split: Split
    kl: float
    """``KL(base || model)``, sum over the answer's tokens, nats."""
    matches: int
    """Tokens at which both models put the same token first."""
    tokens: int


@dataclass(frozen=True, kw_only=True)
class SimilarityRow:
    """One reply to a normal prompt against the answers that the dataset has for it, the best of them counted.

    A gibberish reply has 0, or its own score where that is lower.
    """

    id: str
    """Of the generation record."""
    rouge_l: float
    learned: float | None


def read_prefill_key(key: str) -> tuple[PrefillOrigin, int]:
    """Whose words a prefill of this name is and how many: ``20``, ``affirmative`` (0 tokens), ``answer/20``."""
    if key == "affirmative":
        return "affirmative", 0
    return ("answer", int(key.removeprefix("answer/"))) if key.startswith("answer/") else ("own", int(key))


def prefills_in_order(keys: Iterable[str]) -> list[str]:
    """Keys of prefills as tables show them: the base model's own words, the shortest first, affirmative, answers."""
    place = {"own": 0, "affirmative": 1, "answer": 2}
    return sorted(set(keys), key=lambda key: (place[read_prefill_key(key)[0]], read_prefill_key(key)[1]))


def record_id(split: Split, kind: Kind, prompt: str, number: int | str = 0) -> str:
    """Name of a prompt in the records: says nothing of its words, and is the same for every model.

    Returns:
        Such as ``unseen-prefill3-0123456789abcdef``.
    """
    return f"{_IN_IDS.get(split, split)}-{kind if kind == 'reply' else f'{kind}{number}'}-{_hash(prompt)}"


def start_id(split: Split, prompt: str) -> str:
    """Name of the base model's reply that prefills of a prompt are cut from."""
    return f"{_IN_IDS.get(split, split)}-start-{_hash(prompt)}"


def prompt_hash(identifier: str) -> str:
    """The part of a record's id that all replies to one prompt share."""
    return identifier.rpartition("-")[2]


def _hash(prompt: str) -> str:
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def header_hash(header: Mapping[str, Any] | Sequence[Any]) -> str:
    """SHA-256 of a header or of other plain data, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def create_private_folder(folder: Path) -> None:
    """Makes a folder with mode 0700; one that is already there keeps its mode.

    Raises:
        OutputError: It can't be made.
    """
    with named_disk_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """Reads keys and values.

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


def check_schema(content: Any, where: str, remedy: str = "evaluate again") -> None:
    """Refuses what another version of SKU wrote, by its ``schema_version``.

    Raises:
        EvaluationError: Another schema version, or none; with ``where`` and ``remedy``.
    """
    found = content.get("schema_version") if isinstance(content, Mapping) else None
    if found != RECORD_VERSION:
        raise EvaluationError(f"{where} has schema version {found}, this SKU reads {RECORD_VERSION}: {remedy}")


@dataclass(frozen=True, kw_only=True)
class JsonArtifact:
    """A dataclass that stands in one JSON file of a folder, its fields beside ``schema_version``."""

    FILE: ClassVar[str]
    AGAIN: ClassVar[str] = "evaluate again"
    """What a user can do where the file doesn't fit."""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"schema_version": RECORD_VERSION, **plain_data(self)}

    @classmethod
    def from_dict(cls, content: Any, where: str = "") -> Self:
        """The inverse of ``to_dict``.

        Raises:
            EvaluationError: Another schema version, or keys that don't fit it; with ``where``.
        """
        check_schema(content, where or cls.FILE, cls.AGAIN)
        fields = {name: value for name, value in content.items() if name != "schema_version"}
        return from_plain(cls, fields, where or cls.FILE, cls.AGAIN)

    def write(self, folder: Path) -> None:
        """Writes the file.

        Raises:
            OutputError: The folder can't be written.
        """
        write_private_text(folder / self.FILE, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")

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

    Raises:
        OutputError: The file can't be written.
    """
    listed = list(rows)
    write_private_text(path, json_lines([{"schema_version": RECORD_VERSION, **header, "rows": len(listed)}, *listed]))


def read_rows(path: Path, row_type: type[Row]) -> tuple[dict[str, Any], list[Row]]:
    """Reads and checks what ``write_rows`` wrote.

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
    header: dict[str, Any] = {}
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{path} line {number}"
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            raise EvaluationError(f"{where} is not JSON ({error.msg}): evaluate again") from None
        if number == 1:
            check_schema(content, where)
            header = content
        else:
            row = from_plain(row_type, content, where)
            if row.id in rows:
                raise EvaluationError(f"{where} repeats the id {row.id}: evaluate again")
            rows[row.id] = row
    if header.get("rows") != len(rows):
        raise EvaluationError(f"{path} holds {len(rows)} rows, its header says {header.get('rows')}: evaluate again")
    del header["schema_version"], header["rows"]
    return header, list(rows.values())


def read_generations(path: Path) -> tuple[dict[str, Any], list[GenerationRecord]]:
    """The header and the records of a ``generations.jsonl``; errors are those of ``read_rows``."""
    return read_rows(path, GenerationRecord)


@functools.cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    # In a tuple, for a dataclass by itself takes no configuration. Python's mode, as replies hold lone surrogates, and
    # not strict, as JSON has no tuples.
    return TypeAdapter(tuple[kind], config=ConfigDict(extra="forbid"))  # type: ignore[valid-type]


def from_plain(kind: type[T], content: Any, where: str, remedy: str = "evaluate again") -> T:
    """The inverse of ``dataclasses.asdict`` after JSON: a dataclass with all that it holds, by its annotations.

    Args:
        kind: A dataclass. Fields that have a default may be missing.
        content: What JSON held.
        where: File, or place in one, for the message.
        remedy: What a user can do.

    Raises:
        EvaluationError: A field is missing, unknown or of another type; in one line.
    """
    try:
        (found,) = _adapter(kind).validate_python((content,), strict=False)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]  # No input: it may be harmful text.
        place = ".".join(map(str, first["loc"][1:])) or "it"
        raise EvaluationError(f"{where} doesn't fit its schema: {place}: {first['msg']}: {remedy}") from None
    return cast(T, found)


class PartialFile(Generic[Row]):
    """The partial file of one finished file."""

    def __init__(self, path: Path, header: Mapping[str, Any], row_type: type[Row]) -> None:
        """Touches nothing yet."""
        self.path = path.with_name(f".{path.name}.partial")
        self._header = {"schema_version": RECORD_VERSION, **header}
        self._row_type = row_type

    def recover(self) -> list[Row]:
        """The rows of an interrupted run; the file is cut to them, or begun anew where it is of something else.

        Raises:
            OutputError: It can't be written.
        """
        rows: list[Row] = []
        with suppress(OSError, ValueError, AttributeError, EvaluationError):
            header, *lines = self.path.read_text(encoding="utf-8", errors="surrogatepass").split("\n")[:-1]
            if header_hash(json.loads(header)) == header_hash(self._header):
                for line in lines:
                    # One by one: those before the first broken line stay.
                    rows.append(from_plain(self._row_type, json.loads(line), str(self.path)))  # noqa: PERF401
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


@dataclass(frozen=True, kw_only=True)
class ResultCache:
    """The files of one evaluation."""

    folder: Path | None
    """Nothing is read or written without one."""
    processes: Processes

    def known(self, file: str, header: Mapping[str, Any], row_type: type[Row]) -> list[Row] | None:
        """The rows of a finished file that was made from the same things, else None: they must be made anew."""
        folder = self.folder
        if folder is None:
            return None

        def read() -> list[Row] | None:
            with suppress(EvaluationError):
                found, rows = read_rows(folder / file, row_type)
                if header_hash(found) == header_hash(header):
                    return rows
            return None

        return self.processes.run_on_rank0(read)

    def rows(
        self, file: str, header: Mapping[str, Any], row_type: type[Row], make: Callable[[], list[Row]]
    ) -> list[Row]:
        """The rows of a file.

        Raises:
            OutputError: The file can't be written.
        """
        rows = self.known(file, header, row_type)
        if rows is None:
            rows = make()
            self.write(file, header, rows)
        return rows

    def write(self, file: str, header: Mapping[str, Any], rows: Sequence[Any]) -> None:
        """Writes a finished file."""
        folder = self.folder
        if folder is not None:
            self.processes.run_on_rank0(lambda: write_rows(folder / file, header, rows))

    def rows_of_main(
        self, file: str, header: Mapping[str, Any], row_type: type[Row], make: Callable[[], list[Row]]
    ) -> list[Row]:
        """As ``rows``, for work that is not shared: only the main process does it, the others wait."""
        return self.rows(file, header, row_type, lambda: self.processes.run_on_rank0(make))
