"""Records of a method comparison: one file ``<name>--seed<k>.json`` per row and training seed.

Keys of a file are ``schema_version`` and the fields of ``MethodRecord``; those of its ``points`` are the fields of
``Point``. ``tokens`` and ``losses`` are numbers between spaces. Every rate, interval and test of a comparison can be
computed again from these files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sku.errors import EvaluationError
from sku.evaluate.record_files import check_schema, read_json_object
from sku.report.method_points import Point, check_keys, lengths_of, read_numbers

SCHEMA_VERSION = 2
BASE = "base"
"""Name of the row of the untouched model, which perplexities are compared with."""
_RECORD_KEYS: Mapping[str, tuple[type, ...]] = {
    "name": (str,), "title": (str,), "method": (str,), "paper_url": (str,), "control": (bool,), "seed": (int,),
    "status": (str,), "failure": (str, type(None)), "key": (str,), "recipe": (dict,), "environment": (dict,),
    "data": (dict,), "training": (dict,), "asked": (dict,), "tokens": (dict,), "points": (list,), "judge": (dict,),
}  # fmt: skip
"""Key of a file -> its JSON types."""


@dataclass(frozen=True, kw_only=True)
class MethodRecord:
    """One row of the comparison, trained with one seed.

    Raises:
        EvaluationError: The fields don't fit together.
    """

    name: str
    """Of the row, for files and code: ``sku``, ``no_guided_distortion``, ``base``, ..."""
    title: str
    """Of the row, for readers."""
    method: str
    paper_url: str
    control: bool
    """Whether the row is there to be compared with, not to be proposed: ``base``, ``always_refuse``, ..."""
    seed: int
    """Of the training."""
    status: Literal["complete", "failed"]
    failure: str | None
    """One line on why it failed, else None. What was measured before a failure stays here and enters no table."""
    key: str
    """Content key of the cache."""
    recipe: Mapping[str, Any]
    environment: Mapping[str, Any]
    data: Mapping[str, Any]
    training: Mapping[str, Any]
    """Steps, seconds, first and last value of each loss term; ``bound_by``, what is beyond its limit a little above
    the strength of the role ``matched`` (null where nothing is, up to the largest strength tried)."""
    asked: Mapping[str, str]
    """Key of ``outcomes`` -> SHA-256 of the ordered prompt ids."""
    tokens: Mapping[str, tuple[int, ...]]
    """Split -> answer tokens of each fixed answer; empty for a control that is no model."""
    points: tuple[Point, ...]
    judge: Mapping[str, Any]
    """The judge's card."""

    def __post_init__(self) -> None:
        checks = {
            f"status {self.status} is neither complete nor failed": self.status in ("complete", "failed"),
            "a failed record needs a failure of one line, a complete one has none": (self.status == "failed")
            == bool(self.failure)
            and "\n" not in (self.failure or ""),
            "a complete record needs at least one point": bool(self.points) or self.status == "failed",
            "two points have the same role published or matched": all(
                sum(role in point.roles for point in self.points) <= 1 for role in ("published", "matched")
            ),
            "a point was asked other things than asked says": all(
                point.outcomes.keys() == self.asked.keys() for point in self.points
            ),
            "points hold different numbers of replies": all(
                lengths_of(point.outcomes) == lengths_of(self.points[0].outcomes) for point in self.points
            ),
            "losses and tokens hold different numbers of answers": all(
                lengths_of(point.losses) == lengths_of(self.tokens) for point in self.points if point.losses
            ),
            "an answer has no token": all(count > 0 for row in self.tokens.values() for count in row),
        }
        for wrong, holds in checks.items():
            if not holds:
                raise EvaluationError(f"{self.file_name}: {wrong}")

    @property
    def file_name(self) -> str:
        """``<name>--seed<k>.json``."""
        return f"{self.name}--seed{self.seed}.json"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; losses are rounded to 4 decimals."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            "schema_version": SCHEMA_VERSION,
            **plain,
            "tokens": {split: " ".join(map(str, row)) for split, row in self.tokens.items()},
            "points": [point.to_dict() for point in self.points],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str = "record") -> MethodRecord:
        """The inverse of ``to_dict``.

        Raises:
            EvaluationError: Another schema version, missing or unknown keys, or values that don't fit them; with
                ``where``.
        """
        if not isinstance(content, Mapping):
            raise EvaluationError(f"{where} does not hold keys and values: run the comparison again")
        check_schema(content, SCHEMA_VERSION, where, "run the comparison again")
        plain = {name: value for name, value in content.items() if name != "schema_version"}
        check_keys(plain, _RECORD_KEYS, where)
        tokens = {split: read_numbers(text, int, f"{where}: tokens") for split, text in plain["tokens"].items()}
        points = tuple(
            Point.from_dict(point, f"{where} point {number}") for number, point in enumerate(plain["points"], start=1)
        )
        return cls(**{**plain, "tokens": tokens, "points": points})


def read_records(folder: Path) -> list[MethodRecord]:
    """Reads all records of a comparison.

    Args:
        folder: Holds files ``<name>--seed<k>.json``; other files are not looked at.

    Returns:
        Records, sorted by name and seed.

    Raises:
        EvaluationError: There is none, one is broken or misnamed, or two complete ones were asked different things.
    """
    paths = sorted(folder.glob("*--seed*.json"))
    if not paths:
        raise EvaluationError(f"{folder} holds no record NAME--seedK.json: run the comparison first")
    records = sorted((read_record(path) for path in paths), key=lambda record: (record.name, record.seed))
    _check_asked_alike(records, folder)
    return records


def _check_asked_alike(records: Iterable[MethodRecord], folder: Path) -> None:
    """Refuses complete records that can't stand in one table; one without fixed answers fits to any."""
    complete = [record for record in records if record.status == "complete"]
    alike: dict[str, Callable[[MethodRecord], Mapping[str, Any]]] = {
        "prompts": lambda record: record.asked,
        "fixed answers": lambda record: record.tokens,
        "judges": lambda record: {name: record.judge[name] for name in ("name", "version") if name in record.judge},
    }
    for what, part_of in alike.items():
        compared = [record for record in complete if part_of(record)]
        for record in compared[1:]:
            if part_of(record) != part_of(compared[0]):
                raise EvaluationError(
                    f"{compared[0].file_name} and {record.file_name} in {folder} have different {what}: compare only "
                    "what was run on the same data with the same settings"
                )


def read_record(path: Path) -> MethodRecord:
    """Reads one record.

    Raises:
        EvaluationError: The file is missing, broken, of another schema, or misnamed.
    """
    record = MethodRecord.from_dict(read_json_object(path, "run the comparison again"), str(path))
    if record.file_name != path.name:
        raise EvaluationError(f"{path} holds the record {record.file_name}: give the file its own name back")
    return record
