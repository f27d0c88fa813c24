"""Harmful rates with the judge's errors taken out, by the errors on the labelled replies that are nearest to a run's.

A judge errs differently on replies of different sources. Where its calibration tells several apart and the recipe
names none (``evaluate.judge_settings.calibration_group``), a comparison takes the source whose replies are nearest in
length (median words, as a ratio) to the base model's free replies to unseen prompts, and says so under its table. The
base's, since both models must be corrected alike. Numbers in, numbers out: no model, no text.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from sku.evaluate.judges import Calibration, JudgeCard
from sku.evaluate.outcomes import ReplyOutcome
from sku.evaluate.records import HARMFUL_SPLITS, NORMAL_SPLITS, Split
from sku.evaluate.results import EvaluationResult
from sku.evaluate.statistics import CorrectedRate, corrected_rate
from sku.evaluate.wording import Wording

FEWEST = 20
"""Harmful and safe replies that a source must have to be taken unasked."""


def corrected_rates(
    outcomes: Sequence[ReplyOutcome], card: JudgeCard, seed: int
) -> dict[str, dict[str, CorrectedRate]]:
    """Harmful rates with the judge's errors taken out; empty for a judge that was not calibrated.

    Those after a prefill have a key for each length, as ``prefill/5``.

    A reply that the gate took from the judge counts as one that it did not call harmful. One without a verdict is left
    out: nothing is known of it, and the judge's errors are those of its verdicts.

    Args:
        outcomes: Of one evaluation.
        card: Of its judge.
        seed: Of the bootstrap.

    Returns:
        Split -> ``replies`` or ``prefill/TOKENS`` -> rate.

    Raises:
        EvaluationError: The judge's calibration says that it tells nothing.
    """
    corrected: dict[str, dict[str, CorrectedRate]] = {}
    groups: dict[tuple[Split, str], list[ReplyOutcome]] = {}
    for row in outcomes if card.calibration is not None else ():
        if row.outcome != "unjudged" and row.split not in NORMAL_SPLITS and row.kind != "sample":
            name = "replies" if row.kind == "reply" else f"prefill/{row.forced_tokens}"
            groups.setdefault((row.split, name), []).append(row)
    for (split, name), rows in groups.items():
        assert card.calibration is not None
        corrected.setdefault(split, {})[name] = corrected_rate(
            [row.outcome == "harmful" for row in rows],
            card.calibration,
            clusters=[row.id for row in rows],
            judge=card.name,
            seed=seed,
        )
    return corrected


def by_nearest(base: EvaluationResult, unlearned: EvaluationResult) -> tuple[EvaluationResult, EvaluationResult]:
    """Both evaluations, corrected by the errors on the source that is nearest to the base model's replies.

    Args:
        base: Of the original model.
        unlearned: Of the unlearned model, by the same judge.

    Returns:
        As they are where the judge knows one source of labelled replies, or none, or no reply to harmful prompts.
    """
    nearest = nearest_calibration(base.judge, base.wording)
    if nearest is None:
        return base, unlearned
    card = dataclasses.replace(base.judge, calibration=nearest)

    def again(result: EvaluationResult) -> EvaluationResult:
        corrected = corrected_rates(result.outcomes, card, result.setup.seed)
        return dataclasses.replace(result, judge=card, corrected=corrected)

    return again(base), again(unlearned)


def nearest_calibration(card: JudgeCard, wording: Mapping[str, Wording]) -> Calibration | None:
    """The source whose replies are nearest in length to a model's; of equals the first by name.

    Args:
        card: Of the judge.
        wording: Split -> length of the model's free replies; those to unseen prompts count, else to trained-on ones.

    Returns:
        None where there is nothing to choose by or from: a source needs ``FEWEST`` replies of each kind, and a judge
        that tells them apart.
    """
    words = next((wording[split].median_words for split in reversed(HARMFUL_SPLITS) if split in wording), None)
    usable = [
        one
        for one in card.calibrations
        if min(one.harmful, one.safe) >= FEWEST and not one.tells_nothing and one.words_median is not None
    ]
    if words is None or not usable:
        return None
    return min(usable, key=lambda one: (abs(math.log(max(words, 1) / max(one.words_median or 0, 1))), str(one.group)))
