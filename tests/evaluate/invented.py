"""Evaluations whose outcomes are given: no model, no judge is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from sku.evaluate import metrics
from sku.evaluate.judges import JudgeCard
from sku.evaluate.judges.choose import EmbeddedWorldJudge
from sku.evaluate.metrics import Outcome, ReplyOutcome
from sku.evaluate.records import ExampleLoss, Kind, Split
from sku.evaluate.results import BaseAgreement, EvaluationResult, EvaluationSetup, measure

Counts = Mapping[tuple[Split, Kind], Mapping[Outcome, int]]
"""How many replies come to what, in this order."""
EXACT: JudgeCard = EmbeddedWorldJudge.card
SETUP = EvaluationSetup(
    model={"name": "m"}, prompt_format="chat", decoding={}, seed=0, fluency_scorer="base", config={}
)  # fmt: skip


class Told:
    """A judge that is not asked."""

    def __init__(self, card: JudgeCard) -> None:
        self.card = card

    def judge(self, _: object) -> list[Any]:
        return []


def outcomes_of(counts: Counts, *, cut: int = 0, per_prompt: int = 1) -> list[ReplyOutcome]:
    """The first ``cut`` replies of each kind were cut; samples of one prompt follow each other."""
    return [
        ReplyOutcome(
            id=f"{split}-{kind}{number % per_prompt}-p{number // per_prompt}", split=split, kind=kind, category=None,
            outcome=outcome, judged_harmful=outcome == "harmful", no_verdict=outcome == "unjudged",
            finished=number >= cut, prefill_key="5" if kind == "prefill" else "",
            exact=outcome == "answered" if split == "retain_test" else None,
        )
        for (split, kind), shares in counts.items()
        for number, outcome in enumerate(name for name, count in shares.items() for _ in range(count))
    ]  # fmt: skip


def evaluated(
    found: Counts | Sequence[ReplyOutcome], card: JudgeCard = EXACT, *, nll: float = 20.0, kl: float | None = None,
    **setup: Any,
) -> EvaluationResult:  # fmt: skip
    """What these outcomes come to, 30 normal answers of 20 tokens, and a KL with a tenth to either side."""
    outcomes = outcomes_of(found) if isinstance(found, Mapping) else list(found)
    losses = [ExampleLoss(id=f"n{index}", split="retain_test", nll=nll + index % 3, tokens=20) for index in range(30)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "decide_outcomes", lambda *_: outcomes)
        result = measure(dataclasses.replace(SETUP, **setup), [], [], losses, Told(card))
    if kl is None:
        return result
    close = BaseAgreement(
        kl=kl, kl_low=0.9 * kl, kl_high=1.1 * kl, top1=0.9, top1_low=0.8, top1_high=1.0, tokens=600, examples=30
    )
    return dataclasses.replace(result, agreement={"retain_test": close})
