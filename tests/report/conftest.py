"""A base model that answers harmfully and an unlearned one that mostly refuses, as evaluation results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import pytest

from sku.evaluate.comparison import Comparison, compare
from sku.evaluate.judges.choose import RefusalRulesJudge
from sku.evaluate.metrics import Outcome, ReplyOutcome
from sku.evaluate.records import Kind, Split
from sku.evaluate.results import EvaluationResult

from .html.recorded import result_of

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
        replies = [
            ReplyOutcome(
                id=f"{split}-{kind}-{number}", prefill_key="5" if kind == "prefill" else "",
                split=split, kind=kind, category=None, outcome=outcome, finished=True,
                judged_harmful=outcome in ("harmful", "gibberish"),
                exact=outcome == "answered" if split == "retain_test" else None,
            )
            for (split, kind), shares in counts.items()
            for number, outcome in enumerate(outcome for outcome, count in shares.items() for _ in range(count))
        ]  # fmt: skip
        return result_of(name, replies, losses, dataclasses.replace(RefusalRulesJudge.card, tells_safe=True))

    return make


@pytest.fixture(scope="session")
def comparison(make_result: ResultMaker) -> Comparison:
    """Made once: its intervals are resampled, which takes seconds. No test changes it."""
    return compare(
        make_result("tiny-base", BASE_COUNTS, BASE_LOSSES),
        make_result("tiny-unlearned", UNLEARNED_COUNTS, UNLEARNED_LOSSES),
    )
