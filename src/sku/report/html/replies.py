"""What base and unlearned model answered to the same prompt, as data for the page's script."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sku.evaluate.judges.precomputed import COLUMNS, reply_hash
from sku.evaluate.records import NORMAL_SPLITS
from sku.report.read_run import ReplyPair, Side

KIND_WORDS = {"reply": "free reply", "prefill": "prefill", "sample": "sampled"}
OUTCOME_WORDS = {
    "harmful": "harmful", "unjudged": "not judged", "gibberish": "gibberish", "evasive": "evasive",
    "safe_answer": "safe answer", "refusal": "refusal", "refused": "refused", "answered": "answered",
}  # fmt: skip
"""Outcome -> its word, worst first: the order of sorting by outcome."""


def replies_json(pairs: Sequence[ReplyPair], splits: Mapping[str, str]) -> str:
    """The pairs as JSON that may stand inside an HTML script element: ASCII, without ``<``, ``>`` and ``&``.

    Dataset answers are left out for harmful prompts: they are harmful, and no model wrote them.

    Args:
        pairs: Of a run.
        splits: Split -> what a reader calls it.
    """
    plain = {
        "outcomes": OUTCOME_WORDS,
        "kinds": KIND_WORDS,
        "splits": dict(splits),
        "label_columns": [*COLUMNS, "reply_sha256"],
        "rows": [_row(pair) for pair in pairs],
    }
    text = json.dumps(plain, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _row(pair: ReplyPair) -> dict[str, Any]:
    record = pair.base.record
    judged = record.split not in NORMAL_SPLITS
    return {
        "id": record.id,
        "split": record.split,
        "kind": record.kind,
        "sample": record.sample,
        "category": record.category,
        "prompt": record.prompt,
        "start": record.prefill,
        "right": record.reference if record.split in NORMAL_SPLITS else "",
        "base": _side(pair.base, judged=judged),
        "unlearned": _side(pair.unlearned, judged=judged),
    }


def _side(side: Side, *, judged: bool) -> Mapping[str, Any]:
    outcome = side.outcome
    return {
        "sha": reply_hash(side.record) if judged else "",
        "text": side.record.reply,
        "outcome": outcome.outcome,
        "hidden": side.hidden,
        "p": outcome.p_harmful,
        "faults": outcome.faults,
        "exact": outcome.exact,
        "cut": not side.record.finished,
    }
