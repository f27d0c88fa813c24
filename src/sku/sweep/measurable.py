"""Whether a judge can tell what the choice of alpha asks it.

Alpha is chosen by harmful rates, so a judge that calls harmless replies harmful chooses by its own errors. What is
known of them stands on its card: ``calibration``, or an exact rule (the embedded world's).
"""

from __future__ import annotations

from sku.config import Recipe, SweepConfig
from sku.data.examples import ForgetRetainData
from sku.errors import EvaluationError
from sku.evaluate.judges import JudgeCard, choose_judge
from sku.sweep.points import Replies


def check_judge(recipe: Recipe, data: ForgetRetainData) -> None:
    """``check_calibrated`` for a recipe that chooses its alpha, before anything is trained.

    Args:
        recipe: Of the run or sweep.
        data: Its splits.

    Raises:
        EvaluationError: As ``check_calibrated``, or there is no such judge.
        RecipeError: A wrong setting of the judge.
    """
    if recipe.chooses_alpha:
        check_calibrated(choose_judge(recipe.evaluate, data).card)


def check_calibrated(
    card: JudgeCard, what: str = "alpha can't be chosen by", instead: str = "set negate.alpha to a number"
) -> None:
    """Refuses a judge of unknown errors.

    Args:
        card: Of the judge that ``evaluate.judge`` names.
        what: Begins the message.
        instead: What to do where the judge stays, for the message.

    Raises:
        EvaluationError: It has no calibration and is no exact rule.
    """
    if card.calibration is None and not card.exact:
        raise EvaluationError(
            f"{what} the judge {card.name}, whose errors were not measured: {instead}, or measure the judge (sku "
            "judge calibrate) and name the file in evaluate.judge_settings.calibration"
        )


def floor_of(card: JudgeCard) -> float:
    """The harmful rate that replies without any harm would show: the share of safe replies that are called harmful.

    Args:
        card: Of a judge.

    Returns:
        That share; 0 for an exact rule.
    """
    return 0.0 if card.calibration is None else 1 - card.calibration.specificity


def judge_notes(card: JudgeCard, config: SweepConfig) -> list[str]:
    """A sentence where the harm that is asked for is less than the judge sees in replies without any."""
    floor = floor_of(card)
    if config.rule != "lowest_alpha" or config.harm_target >= floor:
        return []
    note = (
        f"sweep.harm_target is {100 * config.harm_target:.3g} %, and {card.name} calls {100 * floor:.3g} % of "
        "replies without harm harmful: no alpha may seem to reach it"
    )
    return [note]


def unmeasurable(card: JudgeCard, base: Replies) -> str | None:
    """Why a judge can't measure whether harm falls; None where it can.

    Args:
        card: Of the judge.
        base: Replies of the base model.

    Returns:
        One sentence where the base model's harmful rate is not shown to be above what harmless replies would have.
    """
    floor = floor_of(card)
    if card.calibration is None or base.harmful.low > floor:
        return None
    return (
        f"this judge can't measure it: {card.name} calls {100 * base.harmful.value:.3g} % of the base model's replies "
        f"harmful (95 %: from {100 * base.harmful.low:.3g} %), and {100 * floor:.3g} % of replies without harm"
    )
