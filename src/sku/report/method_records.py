"""Records of a method comparison: one file ``<name>--seed<k>.json`` per row and training seed.

Keys of a file are ``schema_version`` and the fields of ``MethodRecord``; those of its ``points`` are the fields of
``Point``: one measured strength each, per prompt, without a word of any prompt or reply. ``outcomes``, ``judged`` and
``exact`` hold one character per prompt; ``tokens`` and ``losses`` are numbers between spaces, one per fixed answer.
All stand in the order of the prompts' ids, so that two rows can be paired. Every rate, interval and test of a
comparison can be computed again from these files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sku.errors import EvaluationError
from sku.evaluate.metrics import Outcome, ReplyOutcome
from sku.evaluate.records import HARMFUL_SPLITS, ExampleLoss, from_plain, grouped, prefills_in_order, read_json_object
from sku.evaluate.results import EvaluationResult
from sku.evaluate.utility_cost import Utility
from sku.storage import RECORD_VERSION

BASE = "base"
"""Name of the row of the untouched model, which perplexities are compared with."""
ROLES = ("published", "matched", "sweep")
"""Roles of a point."""
NORMAL_KEY = "retain_test/reply"
PREFILL = "forget_test/prefill"
"""Begins the keys of unseen prompts that were asked with a prefill."""
_HARMFUL_KEY = re.compile(rf"({'|'.join(HARMFUL_SPLITS)})/(reply|prefill/(?:affirmative|(?:answer/)?[1-9][0-9]*))")
LETTERS: Mapping[Outcome, str] = {
    "harmful": "h", "refusal": "r", "evasive": "e", "gibberish": "d", "unjudged": "u", "answered": "a",
    "refused": "o", "safe_answer": "s",
}  # fmt: skip
"""Outcome -> its letter. Harmful prompts have h, r, e, s, d, u; normal prompts a, o, d."""
Hit = Literal[
    "harmful", "harmful_ungated", "coherent_safe", "gibberish", "unjudged", "no_verdict", "over_refusal",
    "exact_answer",
]  # fmt: skip
"""What is counted, under the names of ``sku.evaluate.metrics``."""
_LETTERS_OF = {"harmful": "h", "coherent_safe": "res", "gibberish": "d", "unjudged": "u", "over_refusal": "o"}
_DECIMALS = 4
"""Of the losses in a file, nats."""
_AGAIN = "run the comparison again"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measured strength of a method.

    Raises:
        EvaluationError: The fields don't fit together.
    """

    strength: float
    """Multiple of the method's own strength; 1 is as published."""
    roles: tuple[str, ...]
    """``published``, ``matched`` (the largest strength found whose cost on the validation splits stays within the
    utility budget), ``sweep``."""
    utility: Utility | None
    """Perplexity, KL and over-refusal on the validation splits, and their cost in shares of the budget; None for a
    control that is no model."""
    outcomes: Mapping[str, str]
    """``forget_test/reply``, ``forget_train/reply``, ``retain_test/reply``, and for each prefill such as
    ``forget_test/prefill/3`` or ``forget_test/prefill/answer/20`` -> one letter of ``LETTERS`` per prompt."""
    judged: Mapping[str, str]
    """The harmful keys of ``outcomes`` -> ``1`` where the judge, without the gate, calls the reply harmful, ``-``
    where it gave no verdict, else ``0``."""
    exact: str
    """Of ``retain_test/reply``: ``1`` the reference word for word, ``0`` not, ``-`` not asked."""
    losses: Mapping[str, tuple[float, ...]]
    """Split -> summed loss of each fixed answer, nats; empty for a control that is no model."""

    def __post_init__(self) -> None:
        harmful = {key: letters for key, letters in self.outcomes.items() if is_harmful_key(key)}
        normal = self.outcomes.get(NORMAL_KEY, "")
        numbers = [self.strength, *(loss for row in self.losses.values() for loss in row)]
        if self.utility is not None:
            spent = self.utility
            numbers += [*spent.perplexity.values(), *spent.kl.values(), spent.over_refusal or 0.0, spent.cost.value]
        checks = {
            "a number is not finite": all(math.isfinite(number) for number in numbers),
            f"roles are not from {', '.join(ROLES)}": bool(self.roles) and {*self.roles} <= {*ROLES},
            "outcomes has an unknown key": harmful.keys() | {NORMAL_KEY} >= self.outcomes.keys(),
            "outcomes of harmful prompts are not from h, r, e, s, d, u": {*"".join(harmful.values())} <= {*"hresdu"},
            "outcomes of normal prompts are not from a, o, d": {*normal} <= {*"aod"},
            "judged is not a 0, 1 or - for each harmful outcome": _lengths_of(self.judged) == _lengths_of(harmful)
            and {*"".join(self.judged.values())} <= {*"01-"},
            f"exact is not a 0, 1 or - for each outcome of {NORMAL_KEY}": len(self.exact) == len(normal)
            and {*self.exact} <= {*"01-"},
        }
        _refuse_unless(checks, f"the point at strength {self.strength:g}")

    @property
    def prefills(self) -> dict[str, str]:
        """Keys of the prefills that unseen prompts were asked with, in order -> key of ``outcomes``."""
        found = (key.removeprefix(f"{PREFILL}/") for key in self.outcomes if key.startswith(f"{PREFILL}/"))
        return {prefill: f"{PREFILL}/{prefill}" for prefill in prefills_in_order(found)}

    def hits(self, key: str, hit: Hit) -> list[bool]:
        """Which replies are a hit, in the order of the prompts; empty where nothing was asked.

        Args:
            key: Of ``outcomes``.
            hit: What is counted; of ``exact_answer`` only those with a reference that is short enough.
        """
        if hit == "exact_answer":
            return [mark == "1" for mark in self.exact if mark != "-"]
        if hit == "harmful_ungated":
            return [mark == "1" for mark in self.judged.get(key, "")]
        if hit == "no_verdict":  # Earlier records tell those of gibberish not apart.
            pairs = zip(self.judged.get(key, ""), self.outcomes.get(key, ""), strict=True)
            return [mark == "-" or letter == "u" for mark, letter in pairs]
        return [letter in _LETTERS_OF[hit] for letter in self.outcomes.get(key, "")]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; losses are rounded to 4 decimals."""
        losses = {split: " ".join(f"{loss:.{_DECIMALS}f}" for loss in row) for split, row in self.losses.items()}
        return {**dataclasses.asdict(self), "roles": list(self.roles), "losses": losses}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str = "point") -> Point:
        """The inverse of ``to_dict``.

        Raises:
            EvaluationError: Missing or unknown keys, or values that don't fit them; with ``where``.
        """
        return from_plain(cls, _with_numbers(content, "losses", float, where), where, _AGAIN)


def _refuse_unless(checks: Mapping[str, bool], where: str) -> None:
    """Raises an error that names the first of the faults that is there."""
    for wrong, holds in checks.items():
        if not holds:
            raise EvaluationError(f"{where}: {wrong}")


def is_harmful_key(key: str) -> bool:
    """Whether a key of ``Point.outcomes`` is one of replies to harmful prompts."""
    return _HARMFUL_KEY.fullmatch(key) is not None


def point_from_result(
    result: EvaluationResult, strength: float, roles: Sequence[str], utility: Utility | None
) -> Point:
    """Writes an evaluation as one point of a record.

    Args:
        result: With its rows (from ``evaluate`` or ``read_result``).
        strength: Multiple of the method's own strength.
        roles: ``published``, ``matched``, ``sweep``.
        utility: What it costs normal behaviour on the validation splits.

    Returns:
        The point, without a word of any prompt or reply.

    Raises:
        EvaluationError: The result holds no replies, or the arguments don't fit.
    """
    replies = _replies(result)
    return Point(
        strength=strength,
        roles=tuple(roles),
        utility=utility,
        outcomes={key: "".join(LETTERS[row.outcome] for row in rows) for key, rows in replies.items()},
        judged={
            key: "".join("01"[row.judged_harmful] if row.has_verdict else "-" for row in rows)
            for key, rows in replies.items()
            if is_harmful_key(key)
        },
        exact="".join("-" if row.exact is None else "01"[row.exact] for row in replies.get(NORMAL_KEY, [])),
        losses={split: tuple(row.nll for row in rows) for split, rows in _answers(result).items()},
    )


def asked_of(result: EvaluationResult) -> dict[str, str]:
    """Key of ``Point.outcomes`` -> SHA-256 of the ordered prompt ids, one a line."""
    return {
        key: hashlib.sha256("\n".join(row.id for row in rows).encode()).hexdigest()
        for key, rows in _replies(result).items()
    }


def tokens_of(result: EvaluationResult) -> dict[str, tuple[int, ...]]:
    """Split -> answer tokens of each fixed answer, in the order of ``Point.losses``."""
    return {split: tuple(row.tokens for row in rows) for split, rows in _answers(result).items()}


def _replies(result: EvaluationResult) -> dict[str, list[ReplyOutcome]]:
    if not result.outcomes:
        raise EvaluationError("an evaluation without replies can't enter a comparison: read it with read_result")
    return grouped(
        sorted(result.outcomes, key=lambda row: row.id),
        lambda row: f"{row.split}/{row.kind}" + (f"/{row.prefill_key}" if row.kind == "prefill" else ""),
    )


def _answers(result: EvaluationResult) -> dict[str, list[ExampleLoss]]:
    return grouped(sorted(result.losses, key=lambda row: row.id), lambda row: row.split)


def _with_numbers(content: Any, name: str, kind: Callable[[str], float], where: str) -> Any:
    """A JSON object whose numbers between spaces, under one key, are numbers."""
    try:
        read = {split: tuple(kind(word) for word in text.split()) for split, text in content[name].items()}
        return {**content, name: read}
    except (KeyError, TypeError):
        return content  # What is wrong with it is told when the rest is looked at.
    except (AttributeError, ValueError):
        raise EvaluationError(f"{where}: {name} are not numbers between spaces: {_AGAIN}") from None


def _lengths_of(rows: Mapping[str, Sequence[object]]) -> dict[str, int]:
    """Name -> number of entries."""
    return {name: len(row) for name, row in rows.items()}


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
                _lengths_of(point.outcomes) == _lengths_of(self.points[0].outcomes) for point in self.points
            ),
            "losses and tokens hold different numbers of answers": all(
                _lengths_of(point.losses) == _lengths_of(self.tokens) for point in self.points if point.losses
            ),
            "an answer has no token": all(count > 0 for row in self.tokens.values() for count in row),
        }
        _refuse_unless(checks, self.file_name)

    @property
    def file_name(self) -> str:
        """``<name>--seed<k>.json``."""
        return f"{self.name}--seed{self.seed}.json"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; losses are rounded to 4 decimals."""
        return {
            "schema_version": RECORD_VERSION,
            **vars(self),
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
        plain = _with_numbers(content, "tokens", int, where)
        if isinstance(plain, Mapping) and isinstance(plain.get("points"), list):
            points = enumerate(plain["points"], start=1)
            plain = {
                **plain,
                "points": [Point.from_dict(point, f"{where} point {number}") for number, point in points],
            }
        return from_plain(cls, plain, where, _AGAIN, versioned=True)


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
    record = MethodRecord.from_dict(read_json_object(path, _AGAIN), str(path))
    if record.file_name != path.name:
        raise EvaluationError(f"{path} holds the record {record.file_name}: give the file its own name back")
    return record
