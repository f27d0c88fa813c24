"""Records of comparisons that never ran."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sku.evaluate.judges import JudgeCard
from sku.evaluate.judges.choose import RefusalRulesJudge
from sku.evaluate.metrics import Outcome, ReplyOutcome
from sku.evaluate.records import ExampleLoss
from sku.report.method_records import NORMAL_KEY, PREFILL, UNSEEN_KEY, MethodRecord, Point

JUDGE: JudgeCard = dataclasses.replace(RefusalRulesJudge.card, tells_safe=True)
OUTCOMES: Mapping[str, Outcome] = {
    "h": "harmful", "r": "refusal", "e": "evasive", "d": "gibberish", "u": "unjudged", "a": "answered",
    "o": "refused", "s": "safe_answer",
}  # fmt: skip


def make_replies(key: str, letters: str, judged: str | None = None, exact: str | None = None) -> list[ReplyOutcome]:
    """A reply a letter; of ``judged`` and ``exact`` 1 is yes, 0 no and - not known."""
    split, kind, *prefill = key.split("/", 2)
    judged = judged or "".join("1" if letter == "h" else "0" for letter in letters)
    exact = exact or "-" * len(letters)
    return [
        ReplyOutcome(
            id=f"{number:04}", split=split, kind="reply" if kind == "reply" else "prefill",
            prefill_key="".join(prefill), category=None, outcome=OUTCOMES[letter], judged_harmful=own == "1",
            no_verdict=own == "-", finished=True, exact=None if word == "-" else word == "1",
        )
        for number, (letter, own, word) in enumerate(zip(letters, judged, exact, strict=True))
    ]  # fmt: skip


def make_point(
    replies: str = "",
    *,
    prefill: str = "",
    normal: str = "",
    judged: str | None = None,
    exact: str | None = None,
    losses: Mapping[str, Iterable[float]] | None = None,
    tokens: Sequence[int] | None = None,
    strength: float = 1.0,
    cost: float = 0.0,
) -> Point:
    """A point from letters: ``replies`` and ``prefill`` of unseen harmful prompts, ``normal`` of normal ones."""
    found = {
        UNSEEN_KEY: make_replies(UNSEEN_KEY, replies, judged),
        f"{PREFILL}/5": make_replies(f"{PREFILL}/5", prefill),
        NORMAL_KEY: make_replies(NORMAL_KEY, normal, exact=exact),
    }
    return Point(
        strength=strength,
        cost=cost,
        replies={key: rows for key, rows in found.items() if rows},
        losses={
            split: [
                ExampleLoss(id=str(place), split=split, nll=float(nll), tokens=tokens[place] if tokens else 10)
                for place, nll in enumerate(row)
            ]
            for split, row in (losses or {}).items()
        },
    )


def make_record(name: str, point: Point | None = None, *, seed: int = 0, **changes: Any) -> MethodRecord:
    plain = {"title": name.replace("_", " "), "control": False, "judge": JUDGE, **changes}
    return MethodRecord(name=name, seed=seed, point=point, **plain)


def failed_record(name: str, seed: int, failure: str) -> MethodRecord:
    return make_record(name, seed=seed, failure=failure, judge=None)
