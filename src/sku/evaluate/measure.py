"""From rows to numbers: no model, no torch, so that a finished evaluation can be judged again.

Harmful rates are also given with the judge's errors taken out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from sku.evaluate.judges import Judge, JudgeCard
from sku.evaluate.metrics import (
    HARMFUL_PROMPT_RATES,
    Rate,
    ReplyOutcome,
    decide_outcomes,
    leaks_of,
    perplexity_of,
    rates_by_category,
    rates_by_prefill,
    rates_of,
    sample_rates,
    wording_of,
    worst_prefill,
)
from sku.evaluate.record_files import (
    FLUENCY_FILE,
    GENERATIONS_FILE,
    PERPLEXITY_FILE,
    read_generations,
    read_rows,
)
from sku.evaluate.records import (
    NORMAL_SPLITS,
    ExampleLoss,
    FluencyRecord,
    GenerationRecord,
    Kind,
    by_split,
    grouped,
    prefills_in_order,
)
from sku.evaluate.results import JUDGE_FREE, EvaluationResult, EvaluationSetup, read_result
from sku.evaluate.statistics import CorrectedRate, corrected_rate

T = TypeVar("T")


def measure(
    setup: EvaluationSetup,
    generations: Sequence[GenerationRecord],
    fluency: Sequence[FluencyRecord],
    losses: Sequence[ExampleLoss],
    judge: Judge,
) -> EvaluationResult:
    """Judges and counts.

    Args:
        setup: What was asked.
        generations: Replies.
        fluency: The base model's losses on them.
        losses: Losses on the dataset's own answers.
        judge: Asked about replies to harmful prompts.

    Returns:
        All rates and perplexities, with the rows they were counted from.

    Raises:
        EvaluationError: The judge's verdicts don't match the replies, or its calibration says that it tells nothing.
    """
    decide = partial(decide_outcomes, generations, fluency=fluency)
    outcomes = decide(judge)
    prefill, decides = _per_split(outcomes, "prefill", rates_by_prefill), judge.card.deciding_rate
    return EvaluationResult(
        setup=setup,
        judge=judge.card,
        replies=_per_split(outcomes, "reply", rates_of),
        prefill=prefill,
        worst_prefill={split: worst_prefill(rates, decides) for split, rates in prefill.items()},
        replies_by_category=_per_split(outcomes, "reply", rates_by_category),
        prefill_by_category=_per_split(outcomes, "prefill", _by_prefill_and_category),
        perplexity={split: perplexity_of(own) for split, own in by_split(losses).items()},
        samples=_per_split(outcomes, "sample", sample_rates),
        leak=_per_split(outcomes, "sample", partial(leaks_of, name=decides)),
        wording={
            split: wording_of(own)
            for split, own in by_split(record for record in generations if record.kind == "reply").items()
        },
        corrected=corrected_rates(outcomes, judge.card, setup.seed),
        outcomes=tuple(outcomes),
        losses=tuple(losses),
    )


def judge_again(folder: Path, judge: Judge) -> EvaluationResult:
    """Judges the replies of a finished evaluation anew; nothing is written.

    Args:
        folder: Output folder of ``evaluate``.
        judge: Any judge.

    Returns:
        The result that ``evaluate`` would have given with this judge and the same starts of prefills: these are as
        they were asked, whichever replies the other judge calls harmful.

    Raises:
        EvaluationError: A file is missing or broken.
    """
    _, generations = read_generations(folder / GENERATIONS_FILE)
    _, fluency = read_rows(folder / FLUENCY_FILE, FluencyRecord)
    _, losses = read_rows(folder / PERPLEXITY_FILE, ExampleLoss)
    before = read_result(folder)
    result = measure(before.setup, generations, fluency, losses, judge)
    return dataclasses.replace(result, **{name: getattr(before, name) for name in JUDGE_FREE})


def _per_split(
    outcomes: Sequence[ReplyOutcome], kind: Kind, count: Callable[[Sequence[ReplyOutcome]], T]
) -> dict[str, T]:
    counted = {split: count(rows) for split, rows in by_split(row for row in outcomes if row.kind == kind).items()}
    return {split: found for split, found in counted.items() if found}


def _by_prefill_and_category(outcomes: Sequence[ReplyOutcome]) -> dict[str, dict[str, dict[str, Rate]]]:
    found = grouped((row for row in outcomes if row.category is not None), lambda row: row.prefill_key)
    return {key: rates_by_category(found[key]) for key in prefills_in_order(found)}


def corrected_rates(
    outcomes: Sequence[ReplyOutcome], card: JudgeCard, seed: int
) -> dict[str, dict[str, CorrectedRate]]:
    """Harmful rates with the judge's errors taken out; empty for a judge that was not calibrated.

    Those after a prefill have a key each, as ``prefill/5``.

    Corrected is the rate that decides (``JudgeCard.deciding_rate``). A reply without a verdict is left out: nothing is
    known of it, and the judge's errors are those of its verdicts.

    Args:
        outcomes: Of one evaluation.
        card: Of its judge.
        seed: Of the bootstrap.

    Returns:
        Split -> ``replies`` or ``prefill/KEY`` -> rate.

    Raises:
        EvaluationError: The judge's calibration says that it tells nothing.
    """
    if card.calibration is None:
        return {}
    corrected: dict[str, dict[str, CorrectedRate]] = {}
    judged = (
        row for row in outcomes
        if row.has_verdict and row.split not in NORMAL_SPLITS and row.kind != "sample"
    )  # fmt: skip
    for (split, key), rows in grouped(judged, lambda row: (row.split, row.prefill_key)).items():
        corrected.setdefault(split, {})[f"prefill/{key}" if key else "replies"] = corrected_rate(
            [*map(HARMFUL_PROMPT_RATES[card.deciding_rate], rows)],
            card.calibration,
            clusters=[row.id for row in rows],
            judge=card.name,
            seed=seed,
        )
    return corrected


def corrected_without(result: EvaluationResult, left_out: Collection[str]) -> EvaluationResult:
    """An evaluation whose corrected rates are of other replies than those of ``left_out``, by id."""
    counted = [row for row in result.outcomes if row.id not in left_out]
    return dataclasses.replace(result, corrected=corrected_rates(counted, result.judge, result.setup.seed))
