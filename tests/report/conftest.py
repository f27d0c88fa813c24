"""A base model that answers harmfully and an unlearned one that mostly refuses, as evaluation results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import pytest

from sku.evaluate.comparison import Comparison, compare
from sku.evaluate.judges.choose import RefusalRulesJudge
from sku.evaluate.metrics import Outcome, Rate, ReplyOutcome, perplexity_of, rates_of
from sku.evaluate.records import ExampleLoss, Kind, Split
from sku.evaluate.results import EvaluationResult, EvaluationSetup

Counts = Mapping[tuple[Split, Kind], Mapping[Outcome, int]]
ResultMaker = Callable[[str, Counts, Mapping[Split, float]], EvaluationResult]

BASE_COUNTS: Counts = {
    ("forget_train", "reply"): {"harmful": 49, "refusal": 1},
    ("forget_test", "reply"): {"harmful": 47, "refusal": 2, "evasive": 1},
    ("forget_train", "prefill"): {"harmful": 50},
    ("forget_test", "prefill"): {"harmful": 49, "evasive": 1},
    ("retain_test", "reply"): {"answered": 50},
}
UNLEARNED_COUNTS: Counts = {
    ("forget_train", "reply"): {"harmful": 1, "refusal": 44, "evasive": 1, "gibberish": 4},
    ("forget_test", "reply"): {"harmful": 4, "refusal": 38, "evasive": 6, "gibberish": 2},
    ("forget_train", "prefill"): {"harmful": 12, "refusal": 20, "evasive": 6, "gibberish": 12},
    ("forget_test", "prefill"): {"harmful": 20, "refusal": 16, "evasive": 5, "gibberish": 9},
    ("retain_test", "reply"): {"answered": 48, "refused": 2},
}
BASE_LOSSES: Mapping[Split, float] = {"retain_test": 8.0, "forget_train": 6.0, "forget_test": 7.0}
UNLEARNED_LOSSES: Mapping[Split, float] = {"retain_test": 8.3, "forget_train": 41.0, "forget_test": 35.0}


@pytest.fixture(scope="session")
def make_result() -> ResultMaker:
    def make(name: str, counts: Counts, losses: Mapping[Split, float]) -> EvaluationResult:
        replies = tuple(
            ReplyOutcome(
                id=f"{split}-{kind}-{number}", prefill_key="5" if kind == "prefill" else "",
                split=split, kind=kind, category=None, outcome=outcome, finished=True,
                judged_harmful=outcome in ("harmful", "gibberish"),
                exact=outcome == "answered" if split == "retain_test" else None,
            )
            for (split, kind), shares in counts.items()
            for number, outcome in enumerate(outcome for outcome, count in shares.items() for _ in range(count))
        )  # fmt: skip
        rows = tuple(
            ExampleLoss(id=f"{split}-{number}", split=split, nll=nll * (1 + number % 5 / 20), tokens=10)
            for split, nll in losses.items()
            for number in range(20)
        )
        perplexity = {split: perplexity_of([row for row in rows if row.split == split]) for split in losses}
        return EvaluationResult(
            setup=EvaluationSetup(
                model={"name": name}, prompt_format="chat", decoding={}, seed=0,
                config={"utility_margin": 1.05}, fluency_scorer="base",
                trained_on={"asked": 20, "visited": 20},
            ),
            judge=dataclasses.replace(RefusalRulesJudge.card, tells_safe=True),
            replies=_rates([reply for reply in replies if reply.kind == "reply"]),
            prefill={
                split: {"5": rates}
                for split, rates in _rates([reply for reply in replies if reply.kind == "prefill"]).items()
            },
            worst_prefill={split: "5" for split, kind in counts if kind == "prefill"},
            replies_by_category={}, prefill_by_category={},
            perplexity={split: value for split, value in perplexity.items() if value is not None},
            outcomes=replies, losses=rows,
        )  # fmt: skip

    return make


def _rates(replies: list[ReplyOutcome]) -> dict[str, dict[str, Rate]]:
    splits = dict.fromkeys(reply.split for reply in replies)
    return {split: rates_of([reply for reply in replies if reply.split == split]) for split in splits}


@pytest.fixture(scope="session")
def comparison(make_result: ResultMaker) -> Comparison:
    """Made once: its intervals are resampled, which takes seconds. No test changes it."""
    return compare(
        make_result("tiny-base", BASE_COUNTS, BASE_LOSSES),
        make_result("tiny-unlearned", UNLEARNED_COUNTS, UNLEARNED_LOSSES),
    )
