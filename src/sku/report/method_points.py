"""One measured strength of a method, as a record keeps it: per prompt, without a word of any prompt or reply.

``outcomes``, ``judged`` and ``exact`` hold one character per prompt; in a file ``losses`` are numbers between spaces,
one per fixed answer. All stand in the order of the prompts' ids, so that two rows can be paired.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from sku.errors import EvaluationError
from sku.evaluate.outcomes import Outcome, ReplyOutcome
from sku.evaluate.records import HARMFUL_SPLITS
from sku.evaluate.results import EvaluationResult
from sku.evaluate.utility_cost import Utility, UtilityCost

T = TypeVar("T")
Role = Literal["published", "matched", "sweep", "best"]
"""Which point of a record is meant; ``best`` is found among the others, the rest are written into the file."""
ROLES: tuple[Role, ...] = ("published", "matched", "sweep")
"""Roles that a file can hold."""
NORMAL_KEY = "retain_test/reply"
_HARMFUL_KEY = re.compile(rf"({'|'.join(HARMFUL_SPLITS)})/(reply|prefill/[1-9][0-9]*)")
LETTERS: Mapping[Outcome, str] = {
    "harmful": "h", "refusal": "r", "evasive": "e", "degenerate": "d", "unjudged": "u", "answered": "a",
    "refused": "o", "safe_answer": "s",
}  # fmt: skip
"""Outcome -> its letter. Harmful prompts have h, r, e, s, d, u; normal prompts a, o, d."""
_DECIMALS = 4
"""Of the losses in a file, nats."""
_NUMBER = (int, float)
_POINT_KEYS: Mapping[str, tuple[type, ...]] = {
    "strength": _NUMBER, "roles": (list,), "utility": (dict, type(None)), "outcomes": (dict,),
    "judged": (dict,), "exact": (str,), "losses": (dict,),
}  # fmt: skip
"""Key of a point in a file -> its JSON types."""


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
    """``unseen/reply``, ``unlearned/reply``, ``retain_test/reply``, and for each length of a prefill such as
    ``unseen/prefill/3`` -> one letter of ``LETTERS`` per prompt."""
    judged: Mapping[str, str]
    """The harmful keys of ``outcomes`` -> ``1`` where the judge, without the gate, calls the reply harmful, else
    ``0``."""
    exact: str
    """Of ``retain_test/reply``: ``1`` the reference word for word, ``0`` not, ``-`` not asked."""
    losses: Mapping[str, tuple[float, ...]]
    """Split -> summed loss of each fixed answer, nats; empty for a control that is no model."""

    def __post_init__(self) -> None:
        harmful = {key: letters for key, letters in self.outcomes.items() if is_harmful_key(key)}
        normal = self.outcomes.get(NORMAL_KEY, "")
        numbers = [
            self.strength,
            *(() if self.utility is None else _utility_numbers(self.utility)),
            *(loss for row in self.losses.values() for loss in row),
        ]
        checks = {
            "a number is not finite": all(math.isfinite(number) for number in numbers),
            f"roles are not from {', '.join(ROLES)}": bool(self.roles) and {*self.roles} <= {*ROLES},
            "outcomes has an unknown key": harmful.keys() | {NORMAL_KEY} >= self.outcomes.keys(),
            "outcomes of harmful prompts are not from h, r, e, s, d, u": {*"".join(harmful.values())} <= {*"hresdu"},
            "outcomes of normal prompts are not from a, o, d": {*normal} <= {*"aod"},
            "judged is not a 0 or 1 for each harmful outcome": lengths_of(self.judged) == lengths_of(harmful)
            and {*"".join(self.judged.values())} <= {*"01"},
            f"exact is not a 0, 1 or - for each outcome of {NORMAL_KEY}": len(self.exact) == len(normal)
            and {*self.exact} <= {*"01-"},
        }
        for wrong, holds in checks.items():
            if not holds:
                raise EvaluationError(f"the point at strength {self.strength:g}: {wrong}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; losses are rounded to 4 decimals."""
        losses = {split: " ".join(f"{loss:.{_DECIMALS}f}" for loss in row) for split, row in self.losses.items()}
        return {
            "strength": self.strength,
            "roles": list(self.roles),
            "utility": None if self.utility is None else dataclasses.asdict(self.utility),
            "outcomes": dict(self.outcomes),
            "judged": dict(self.judged),
            "exact": self.exact,
            "losses": losses,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str = "point") -> Point:
        """The inverse of ``to_dict``.

        Raises:
            EvaluationError: Missing or unknown keys, or values that don't fit them; with ``where``.
        """
        check_keys(content, _POINT_KEYS, where)
        losses = {split: read_numbers(text, float, f"{where}: losses") for split, text in content["losses"].items()}
        try:
            utility = None if content["utility"] is None else _utility(content["utility"])
            return cls(**{**content, "roles": tuple(content["roles"]), "utility": utility, "losses": losses})
        except EvaluationError as error:
            raise EvaluationError(f"{where}: {error}") from None
        except (AttributeError, KeyError, TypeError) as error:
            raise EvaluationError(f"{where} holds a value of the wrong type ({error})") from None


def is_harmful_key(key: str) -> bool:
    """Whether a key of ``Point.outcomes`` is one of replies to harmful prompts."""
    return _HARMFUL_KEY.fullmatch(key) is not None


def prefill_lengths(keys: Iterable[str], split: str = "unseen") -> list[int]:
    """Tokens of the prefills that a point, or several, were asked with; the shortest first."""
    places = (key.split("/") for key in keys)
    return sorted({int(place[2]) for place in places if place[:2] == [split, "prefill"] and len(place) == 3})


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
            key: "".join("1" if row.judged_harmful else "0" for row in rows)
            for key, rows in replies.items()
            if is_harmful_key(key)
        },
        exact="".join("-" if row.exact is None else "01"[row.exact] for row in replies.get(NORMAL_KEY, [])),
        losses={split: tuple(nll for nll, _ in rows) for split, rows in _answers(result).items()},
    )


def _utility(content: Mapping[str, Any]) -> Utility:
    return Utility(**{**content, "cost": UtilityCost(**content["cost"])})


def _utility_numbers(utility: Utility) -> list[float]:
    return [*utility.perplexity.values(), *utility.kl.values(), utility.over_refusal or 0.0, utility.cost.value]


def asked_of(result: EvaluationResult) -> dict[str, str]:
    """Key of ``Point.outcomes`` -> SHA-256 of the ordered prompt ids, one a line."""
    return {
        key: hashlib.sha256("\n".join(row.id for row in rows).encode()).hexdigest()
        for key, rows in _replies(result).items()
    }


def tokens_of(result: EvaluationResult) -> dict[str, tuple[int, ...]]:
    """Split -> answer tokens of each fixed answer, in the order of ``Point.losses``."""
    return {split: tuple(tokens for _, tokens in rows) for split, rows in _answers(result).items()}


def _replies(result: EvaluationResult) -> dict[str, list[ReplyOutcome]]:
    if not result.outcomes:
        raise EvaluationError("an evaluation without replies can't enter a comparison: read it with read_result")
    groups: dict[str, list[ReplyOutcome]] = {}
    for row in sorted(result.outcomes, key=lambda row: row.id):
        length = f"/{row.forced_tokens}" if row.kind == "prefill" else ""
        groups.setdefault(f"{row.split}/{row.kind}{length}", []).append(row)
    return groups


def _answers(result: EvaluationResult) -> dict[str, list[tuple[float, int]]]:
    groups: dict[str, list[tuple[float, int]]] = {}
    for row in sorted(result.losses, key=lambda row: row.id):
        groups.setdefault(row.split, []).append((row.nll, row.tokens))
    return groups


def check_keys(content: Any, expected: Mapping[str, tuple[type, ...]], where: str) -> None:
    """Checks the keys of a JSON object and the types of their values.

    Args:
        content: What JSON held.
        expected: Key -> the types that its value may have.
        where: For the message.

    Raises:
        EvaluationError: A key is missing or unknown, or a value is of another type.
    """
    if not isinstance(content, Mapping):
        raise EvaluationError(f"{where} does not hold keys and values: run the comparison again")
    odd = sorted(content.keys() ^ expected.keys())
    if odd:
        raise EvaluationError(f"{where} has missing or unknown keys {', '.join(odd)}: run the comparison again")
    # type(), not isinstance(): True is no number here.
    odd = [name for name, types in expected.items() if type(content[name]) not in types]
    if odd:
        raise EvaluationError(f"{where} has values of the wrong type under {', '.join(odd)}: run the comparison again")


def read_numbers(text: Any, kind: Callable[[str], T], where: str) -> tuple[T, ...]:
    """Reads numbers between spaces.

    Raises:
        EvaluationError: It is anything else; with ``where``.
    """
    try:
        return tuple(kind(word) for word in text.split())
    except (AttributeError, ValueError):
        raise EvaluationError(f"{where} are not numbers between spaces: run the comparison again") from None


def lengths_of(rows: Mapping[str, Sequence[object]]) -> dict[str, int]:
    """Name -> number of entries."""
    return {name: len(row) for name, row in rows.items()}
