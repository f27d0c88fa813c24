"""What base and unlearned model answered to the same prompt, side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sku.errors import EvaluationError
from sku.evaluate.outcomes import ReplyOutcome
from sku.evaluate.record_files import GENERATIONS_FILE, OUTCOMES_FILE, read_generations, read_rows
from sku.evaluate.records import NORMAL_SPLITS, GenerationRecord

SHOWN_OUTCOMES = ("refusal", "safe_answer", "evasive")
"""Outcomes of replies to harmful prompts that are shown as they are; all others are blurred."""
KIND_WORDS = {"reply": "free reply", "prefill": "prefill", "sample": "drawn"}
OUTCOME_WORDS = {
    "harmful": "harmful", "unjudged": "not judged", "degenerate": "gibberish", "evasive": "evasive",
    "safe_answer": "safe answer", "refusal": "refusal", "refused": "refused", "answered": "answered",
}  # fmt: skip
"""Outcome -> its word, worst first: the order of sorting by outcome."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One model's reply and what it came to."""

    record: GenerationRecord
    outcome: ReplyOutcome

    @property
    def hidden(self) -> bool:
        """Whether a reader must ask before it is shown."""
        if self.record.split in NORMAL_SPLITS:
            return False
        return self.outcome.judged_harmful or self.outcome.outcome not in SHOWN_OUTCOMES


@dataclass(frozen=True, kw_only=True)
class ReplyPair:
    """The replies of both models to one prompt, asked in the same way."""

    base: Side
    unlearned: Side


def read_reply_pairs(base: Path, unlearned: Path) -> tuple[tuple[ReplyPair, ...], str]:
    """Pairs two evaluation folders, prompt by prompt.

    Args:
        base: Holds ``generations.jsonl`` and ``outcomes.jsonl``.
        unlearned: The same of the unlearned model.

    Returns:
        The pairs in the order in which the base was asked, and the judge that labelled them.

    Raises:
        EvaluationError: A file is missing or broken, or the two were not asked or judged alike.
    """
    before, judge = _sides(base)
    after, other_judge = _sides(unlearned)
    if before.keys() != after.keys():
        raise EvaluationError(f"{base} and {unlearned} hold replies to different prompts: evaluate both again")
    if judge != other_judge:
        raise EvaluationError(
            f"{base} was judged by {judge} and {unlearned} by {other_judge}: judge both again with one of them"
        )
    return tuple(ReplyPair(base=side, unlearned=after[name]) for name, side in before.items()), judge


def _sides(folder: Path) -> tuple[dict[str, Side], str]:
    _, records = read_generations(folder / GENERATIONS_FILE)
    header, outcomes = read_rows(folder / OUTCOMES_FILE, ReplyOutcome)
    found = {outcome.id: outcome for outcome in outcomes}
    if found.keys() != {record.id for record in records}:
        raise EvaluationError(f"{folder / OUTCOMES_FILE} labels other replies than {GENERATIONS_FILE}: evaluate again")
    for outcome in outcomes:
        if outcome.p_harmful is not None and not math.isfinite(outcome.p_harmful):
            raise EvaluationError(f"{folder / OUTCOMES_FILE}: p_harmful of {outcome.id} is no number: judge again")
    return {record.id: Side(record=record, outcome=found[record.id]) for record in records}, str(header.get("judge"))


def replies_json(pairs: Sequence[ReplyPair], splits: Mapping[str, str]) -> str:
    """The pairs as JSON that may stand inside an HTML script element: ASCII, without ``<``, ``>`` and ``&``.

    Dataset answers are left out for harmful prompts: they are harmful, and no model wrote them.

    Args:
        pairs: From ``read_reply_pairs``.
        splits: Split -> what a reader calls it.
    """
    plain = {
        "outcomes": OUTCOME_WORDS,
        "kinds": KIND_WORDS,
        "splits": dict(splits),
        "rows": [_row(pair) for pair in pairs],
    }
    text = json.dumps(plain, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _row(pair: ReplyPair) -> dict[str, Any]:
    record = pair.base.record
    return {
        "split": record.split,
        "kind": record.kind,
        "sample": record.sample,
        "category": record.category,
        "prompt": record.prompt,
        "start": record.forced_start,
        "right": record.reference if record.split in NORMAL_SPLITS else "",
        "base": _side(pair.base),
        "unlearned": _side(pair.unlearned),
    }


def _side(side: Side) -> Mapping[str, Any]:
    outcome = side.outcome
    return {
        "text": side.record.reply,
        "outcome": outcome.outcome,
        "hidden": side.hidden,
        "p": outcome.p_harmful,
        "faults": outcome.faults,
        "exact": outcome.exact,
        "cut": not side.record.finished,
    }
