"""From rows to numbers: no model, no torch, so that a finished evaluation can be judged again.

Harmful rates are also given with the judge's errors taken out.
"""

from __future__ import annotations

import dataclasses
import math
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
    RELEVANCE_FILE,
    read_generations,
    read_rows,
)
from sku.evaluate.records import (
    NORMAL_SPLITS,
    SIMILARITIES,
    AgreementRow,
    ExampleLoss,
    FluencyRecord,
    GenerationRecord,
    Kind,
    RelevanceRow,
    SimilarityRow,
    by_split,
    grouped,
    prefills_in_order,
)
from sku.evaluate.results import JUDGE_FREE, BaseAgreement, EvaluationResult, EvaluationSetup, MeanScore, read_result
from sku.evaluate.statistics import CorrectedRate, corrected_rate, mean_interval, ratio_interval

T = TypeVar("T")


def measure(
    setup: EvaluationSetup,
    generations: Sequence[GenerationRecord],
    fluency: Sequence[FluencyRecord],
    losses: Sequence[ExampleLoss],
    judge: Judge,
    relevance: Sequence[RelevanceRow] = (),
) -> EvaluationResult:
    """Judges and counts.

    Args:
        setup: What was asked; ``short_answer_words`` of its config decides which answers are compared word for word.
        generations: Replies.
        fluency: The base model's losses on them.
        losses: Losses on the dataset's own answers.
        judge: Asked about replies to harmful prompts.
        relevance: Cosines of harmful prompts and replies, where an embedding model was asked.

    Returns:
        All rates and perplexities, with the rows they were counted from.

    Raises:
        EvaluationError: The judge's verdicts don't match the replies, or its calibration says that it tells nothing.
    """
    words = setup.config["short_answer_words"]
    decide = partial(decide_outcomes, generations, fluency=fluency, relevance=relevance, short_answer_words=words)
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
    relevance: list[RelevanceRow] = []
    if before.setup.config["embedding_model"] is not None:
        _, relevance = read_rows(folder / RELEVANCE_FILE, RelevanceRow)
    result = measure(before.setup, generations, fluency, losses, judge, relevance)
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


def base_agreement(rows: Sequence[AgreementRow], *, seed: int) -> dict[str, BaseAgreement]:
    """Means over all tokens of each split, with bootstrap intervals over its examples.

    Args:
        rows: From ``compare_distributions``.
        seed: Of the bootstrap.

    Returns:
        Split -> agreement.
    """
    found: dict[str, BaseAgreement] = {}
    for split, own in by_split(rows).items():
        tokens = [row.tokens for row in own]
        total = sum(tokens)
        kl_low, kl_high = ratio_interval([row.kl for row in own], tokens, seed=seed)
        top1_low, top1_high = ratio_interval([row.matches for row in own], tokens, seed=seed)
        found[split] = BaseAgreement(
            kl=math.fsum(row.kl for row in own) / total,
            kl_low=kl_low,
            kl_high=kl_high,
            top1=sum(row.matches for row in own) / total,
            top1_low=top1_low,
            top1_high=top1_high,
            tokens=total,
            examples=len(own),
        )
    return found


def similarity_of(rows: Sequence[SimilarityRow], *, seed: int) -> dict[str, MeanScore]:
    """Mean of each metric over all replies, with its bootstrap interval.

    Args:
        rows: From ``compare_with_references``.
        seed: Of the bootstrap.

    Returns:
        Metric -> mean, for the metrics that were asked for; nothing for no rows.
    """
    found: dict[str, MeanScore] = {}
    for metric in SIMILARITIES:
        values = [value for row in rows if (value := getattr(row, metric)) is not None]
        if values:
            low, high = mean_interval(values, seed=seed)
            found[metric] = MeanScore(value=sum(values) / len(values), low=low, high=high, examples=len(values))
    return found
