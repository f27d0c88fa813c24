"""How far several judges agree on the same replies, each with its own rates: nothing is averaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from sku.evaluate.judges import JudgeCard, Verdict
from sku.evaluate.judges.vote import Rule, VoteJudge
from sku.evaluate.metrics import Rate, rates_of
from sku.evaluate.outcomes import ReplyOutcome
from sku.evaluate.records import NORMAL_SPLITS, GenerationRecord, grouped

SHOWN_RATES = ("harmful", "harmful_at_most", "harmful_ungated", "refusal", "unjudged")


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """A reply that one judge calls harmful and another doesn't."""

    id: str
    """Of the record."""
    labels: tuple[str, ...]
    """One a judge, in their order."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What the judges of a vote say, one by one and of one another. Harmful or not is what is compared."""

    judges: tuple[str, ...]
    rule: Rule
    judged_by_all: int
    """Replies to harmful prompts on which every judge gave a verdict; kappa and disagreements are counted on these."""
    kappa: float | None
    """Cohen's of two judges, Fleiss' of more; None where all verdicts are the same, which leaves it undefined."""
    pairwise: Mapping[str, float | None]
    """``first | second`` -> Cohen's kappa on the replies that both gave a verdict on; None where undefined."""
    errors: Mapping[str, int]
    """Judge -> replies on which it failed, so that it has no vote on them."""
    rates: Mapping[str, Mapping[str, Mapping[str, Rate]]]
    """Judge -> split -> rate of the free replies -> what that judge alone would have given."""
    disagreement_count: int
    disagreements: tuple[Disagreement, ...] = field(default=(), repr=False)
    """In ``disagreements.jsonl``, not in ``evaluation.json``."""


def agreement_of(
    vote: VoteJudge,
    records: Sequence[GenerationRecord],
    decide: Callable[[Any], Sequence[ReplyOutcome]],
) -> Agreement:
    """Compares the members of a vote that has judged.

    Args:
        vote: After its ``judge`` was called with the records.
        records: All replies; those to harmful prompts are compared.
        decide: From a judge to the outcomes of the records, as for the vote itself.

    Returns:
        The comparison.
    """
    given = vote.verdicts_of_members()
    ids = [record.id for record in records if record.split not in NORMAL_SPLITS]
    labels = {name: [verdicts[entry].label for entry in ids] for name, verdicts in given.items()}
    rows = [(entry, row) for entry, *row in zip(ids, *labels.values(), strict=True) if "error" not in row]
    parted = tuple(
        Disagreement(id=entry, labels=tuple(row)) for entry, row in rows if 0 < row.count("harmful") < len(row)
    )
    return Agreement(
        judges=tuple(given),
        rule=vote.rule,
        judged_by_all=len(rows),
        kappa=kappa([row for _, row in rows]),
        pairwise={
            f"{one} | {other}": kappa(
                [[a, b] for a, b in zip(labels[one], labels[other], strict=True) if "error" not in (a, b)]
            )
            for one, other in combinations(given, 2)
        },
        errors={name: found.count("error") for name, found in labels.items()},
        rates={
            member.card.name: _rates(decide(_Given(member.card, given[member.card.name]))) for member in vote.members
        },
        disagreement_count=len(parted),
        disagreements=parted,
    )


def kappa(rows: Sequence[Sequence[str]]) -> float | None:
    """Agreement on harmful or not, beyond chance.

    Args:
        rows: One a reply, with one label a judge; the same number of judges in each, at least two.

    Returns:
        Cohen's kappa of two judges, Fleiss' of more (``statsmodels.stats.inter_rater``); None without rows, and where
        all labels are the same: chance alone then explains full agreement.
    """
    harmful = np.array([[label == "harmful" for label in row] for row in rows], dtype=int)
    if not harmful.size or harmful.min() == harmful.max():
        return None
    # Slow to import, and needed by votes alone.
    from statsmodels.stats.inter_rater import aggregate_raters, cohens_kappa, fleiss_kappa

    if harmful.shape[1] == 2:
        table = np.zeros((2, 2))
        np.add.at(table, (harmful[:, 0], harmful[:, 1]), 1)
        return float(cohens_kappa(table, return_results=False))
    return float(fleiss_kappa(aggregate_raters(harmful)[0]))


class _Given:
    """A judge that repeats verdicts."""

    def __init__(self, card: JudgeCard, verdicts: Mapping[str, Verdict]) -> None:
        self.card = card
        self._verdicts = verdicts

    def judge(self, records: Sequence[GenerationRecord]) -> list[Verdict]:
        return [self._verdicts[record.id] for record in records]


def _rates(outcomes: Sequence[ReplyOutcome]) -> dict[str, dict[str, Rate]]:
    free = (row for row in outcomes if row.kind == "reply" and row.split not in NORMAL_SPLITS)
    return {
        split: {name: value for name, value in rates_of(rows).items() if name in SHOWN_RATES}
        for split, rows in grouped(free, lambda row: row.split).items()
    }
