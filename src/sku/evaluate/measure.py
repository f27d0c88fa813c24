"""From rows to numbers: no model, no torch, so that a finished evaluation can be judged again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from sku.evaluate.judges import Judge
from sku.evaluate.leakage import leaks_of, sample_rates
from sku.evaluate.metrics import perplexity_of, rates_by_category, rates_of
from sku.evaluate.outcomes import ReplyOutcome, decide_outcomes
from sku.evaluate.record_files import FLUENCY_FILE, GENERATIONS_FILE, PERPLEXITY_FILE, read_generations, read_rows
from sku.evaluate.records import ExampleLoss, FluencyRecord, GenerationRecord, Kind, Split
from sku.evaluate.results import EvaluationResult, EvaluationSetup, read_result

SPLITS: tuple[Split, ...] = ("unlearned", "unseen", "retain_test", "benign", "xstest_safe", "xstest_unsafe")
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
        setup: What was asked; ``short_answer_words`` of its config decides which answers are compared word for word.
        generations: Replies.
        fluency: The base model's losses on them.
        losses: Losses on the dataset's own answers.
        judge: Asked about replies to harmful prompts.

    Returns:
        All rates and perplexities, with the rows they were counted from.

    Raises:
        EvaluationError: The judge's verdicts don't match the replies.
    """
    outcomes = decide_outcomes(
        generations,
        judge,
        {record.id: record for record in fluency},
        short_answer_words=setup.config["short_answer_words"],
    )
    return EvaluationResult(
        setup=setup,
        judge=judge.card,
        replies=_per_split(outcomes, "reply", rates_of),
        prefill=_per_split(outcomes, "prefill", rates_of),
        replies_by_category=_per_split(outcomes, "reply", rates_by_category),
        prefill_by_category=_per_split(outcomes, "prefill", rates_by_category),
        perplexity={
            split: found
            for split in SPLITS
            if (found := perplexity_of([loss for loss in losses if loss.split == split])) is not None
        },
        samples=_per_split(outcomes, "sample", sample_rates),
        leak=_per_split(outcomes, "sample", leaks_of),
        outcomes=tuple(outcomes),
        losses=tuple(losses),
    )


def judge_again(folder: Path, judge: Judge) -> EvaluationResult:
    """Judges the replies of a finished evaluation anew; nothing is written.

    Args:
        folder: Output folder of ``evaluate``.
        judge: Any judge.

    Returns:
        The result that ``evaluate`` would have given with this judge.

    Raises:
        EvaluationError: A file is missing or broken.
    """
    _, generations = read_generations(folder / GENERATIONS_FILE)
    _, fluency = read_rows(folder / FLUENCY_FILE, FluencyRecord)
    _, losses = read_rows(folder / PERPLEXITY_FILE, ExampleLoss)
    return measure(read_result(folder).setup, generations, fluency, losses, judge)


def _per_split(
    outcomes: Sequence[ReplyOutcome], kind: Kind, count: Callable[[Sequence[ReplyOutcome]], T]
) -> dict[str, T]:
    counted = {split: count([row for row in outcomes if (row.split, row.kind) == (split, kind)]) for split in SPLITS}
    return {split: found for split, found in counted.items() if found}
