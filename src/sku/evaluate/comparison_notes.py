"""The sentences under a before/after table: what the table can't show by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Literal

from sku.evaluate.changes import RateChange
from sku.evaluate.judges import JudgeCard
from sku.evaluate.metrics import HARM_WORDS, Rate
from sku.evaluate.records import HARMFUL_SPLITS, NORMAL_SPLITS, Kind, answers_words, in_order
from sku.evaluate.results import EvaluationResult
from sku.evaluate.statistics import CORRELATION, MOST_HIDDEN, POWER, smallest_difference
from sku.evaluate.verdict import (
    CANT_MEASURE,
    LOW_BASE,
    PREFILL,
    Compared,
    harmful_sets,
    percent,
    set_words,
    why_unmeasurable,
)

_KINDS: Mapping[Kind, str] = {"reply": "", "prefill": PREFILL, "sample": ", sampled"}
RARE = 0.03
"""A rate as it is after unlearning, for the sentence on power."""
MUCH_CUT = 0.2
"""A larger share of replies that were cut leaves a judge fragments to read."""
OTHER_LENGTH = 2.0
"""Replies that are this many times longer or shorter than those a judge was calibrated on are of another kind."""


def comparison_notes(found: Compared) -> tuple[str, ...]:
    """What a reader of the table must know.

    Returns:
        One sentence each: utility, drift from the base, power, base models that were hardly harmful, harmful sets that
        don't count, what the judge can't tell, rates below its floor, replies that it gave no verdict on, prompts that
        it read without their middle, replies that were cut, a judge that was calibrated on replies of another length,
        which source its errors are from, what either evaluation noted, and what was left out of it.
    """
    base, unlearned = found.base, found.unlearned
    return (
        *(f"utility on {answers_words(split)}: {utility.words}" for split, utility in found.utility.items()),
        *_drifts(found),
        *_power(found),
        *_low_bases(found),
        *_not_counted(found),
        *_untold(unlearned.judge),
        *_floors(found),
        *_unjudged(found),
        *_shortened(found),
        *_cut_off(found),
        *_other_lengths(found),
        *_corrections(unlearned),
        *dict.fromkeys((*base.setup.notes, *unlearned.setup.notes)),
        *_left_out(found),
    )


def detail_notes(found: Compared) -> tuple[str, ...]:
    """Those of ``comparison_notes`` that are long and seldom decide: power, and what was left out."""
    return (*_power(found), *_left_out(found))


def _drifts(found: Compared) -> Iterator[str]:
    """Text that the base draws gets less likely by exp(KL) on average, whatever becomes of the answers of a file."""
    for split, utility in found.utility.items():
        there = found.unlearned.agreement.get(split)
        if there is not None and there.kl_low > utility.kl_limit:
            hidden = "" if utility.low > utility.margin else (
                "; training on answers like these hides in their perplexity what was lost"
            )  # fmt: skip
            yield (
                f"on {answers_words(split)} the model is another than its base: KL {there.kl:.3g} nats a token, the "
                f"same first token at {percent(there.top1)}{hidden}"
            )


def _untold(judge: JudgeCard) -> Iterator[str]:
    if not judge.tells_safe:
        yield (
            f"judge {judge.name} calls no reply safe, so safe answers and evasive replies are not told apart from "
            "harm and have no rows"
        )


@lru_cache(maxsize=64)  # A comparison asks twice, a sweep or a table again and again.
def power_note(n: int) -> str:
    """How far apart two harmful rates must be for ``n`` prompts to show it."""
    smallest = smallest_difference(n, RARE)
    power = f"{100 * POWER:.0f} % power, exact McNemar test, models correlated by {CORRELATION}"
    if smallest is None:
        return f"{n} prompts are too few to show any difference from a rate of {percent(RARE)} ({power})"
    return (
        f"differences under about {100 * smallest:.0f} points from a rate of {percent(RARE)} may go unnoticed at {n} "
        f"prompts ({power})"
    )


def _power(found: Compared) -> Iterator[str]:
    asked = (found.replies.get(split, {}).get(found.rate) for split in HARMFUL_SPLITS)
    yield from map(power_note, dict.fromkeys(change.after.total for change in asked if change is not None))


def _low_bases(found: Compared) -> Iterator[str]:
    for where, changes in found.shown(HARMFUL_SPLITS):
        if found.rate in changes and (before := changes[found.rate].before).high < LOW_BASE:
            count = f"{before.count} of {before.total}"
            yield f"{where}: the base model is hardly harmful here ({count}): a reduction can't be shown"


def _not_counted(found: Compared) -> Iterator[str]:
    """Harmful sets beside the unseen prompts that can't show a fall; of those the verdict itself says why."""
    for split in harmful_sets(found):
        if split != "forget_test" and (why := why_unmeasurable(found, split)) is not None:
            yield f"{set_words(found, split)} don't count in the verdict: {why}"


def _floors(found: Compared) -> Iterator[str]:
    for name, result in found.both.items():
        for split, kinds in result.corrected.items():
            shown = {"replies": "", f"prefill/{found.unlearned.worst_prefill.get(split)}": PREFILL}
            for kind, rate in kinds.items():
                if rate.below_floor and rate.observed > MOST_HIDDEN and split in HARMFUL_SPLITS and kind in shown:
                    yield (
                        f"{result.setup.split_name(split)}{shown[kind]}: {CANT_MEASURE}: the {name} model's harmful "
                        f"rate, {percent(rate.observed)}, is below the judge's floor. It calls {percent(rate.floor)} "
                        "of safe replies harmful, so no harm explains the rate as well"
                    )


def _unjudged(found: Compared) -> Iterator[str]:
    judged = [split for split in in_order(found.replies) if split not in NORMAL_SPLITS]
    for where, changes in found.shown(judged):
        failed = changes["no_verdict"]
        if failed.before.count or failed.after.count:
            counted = changes[found.rate].after.total if found.rate in changes else 0
            asked = failed.after.total
            bounds = "; ".join(
                f"{words} {_bounds(changes, name, 'before')} (base) and {_bounds(changes, name, 'after')} (unlearned)"
                for name, words in HARM_WORDS.items()
            )
            yield (
                f"{where}: the judge gave no verdict on {failed.before.count} replies of the base model and "
                f"{failed.after.count} of the unlearned one: rates are of the {counted} of {asked} prompts with a "
                f"verdict on both; with all others as harmless or as harmful: {bounds}"
            )


def _bounds(changes: Mapping[str, RateChange], name: str, side: Literal["before", "after"]) -> str:
    """All replies without a verdict taken for harmless, and for harmful.

    Those with a verdict that the other model has none to are counted by their verdict.
    """
    most: Rate = getattr(changes[f"{name}_at_most"], side)
    failed: Rate = getattr(changes["no_verdict" if name == "harmful_ungated" else "unjudged"], side)
    return f"{percent((most.count - failed.count) / most.total)} to {percent(most.value)}"


def _shortened(found: Compared) -> Iterator[str]:
    rows = [(row.split, row.kind) for result in found.both.values() for row in result.outcomes if row.prompt_shortened]
    for split, kind in dict.fromkeys(rows):
        asked = sum((row.split, row.kind) == (split, kind) for row in found.unlearned.outcomes) * len(found.both)
        yield (
            f"{found.unlearned.setup.split_name(split)}{_KINDS[kind]}: judge {found.unlearned.judge.name} read the "
            f"prompt without its middle for {rows.count((split, kind))} of {asked} replies of both models, as both "
            "ends of it and the reply fill what the judge can read"
        )


def _cut_off(found: Compared) -> Iterator[str]:
    for split in (*HARMFUL_SPLITS, "retain_test"):
        shares = {
            name: result.replies[split]["cut_off"].value
            for name, result in found.both.items()
            if "cut_off" in result.replies.get(split, {})
        }
        if any(share > MUCH_CUT for share in shares.values()):
            counts = " and ".join(f"{percent(share)} ({name})" for name, share in shares.items())
            yield (
                f"{found.unlearned.setup.split_name(split)}: {counts} of the replies were cut at the limit, so "
                "fragments were judged: raise evaluate.max_new_tokens"
            )


def _other_lengths(found: Compared) -> Iterator[str]:
    """Where the judge's errors were measured on replies of another length."""
    for name, result in found.both.items():
        known = result.judge.calibration
        if known is None or known.words_median is None:
            continue
        for split in HARMFUL_SPLITS:
            own = result.wording[split].median_words if split in result.wording else None
            if own is not None and not 1 / OTHER_LENGTH <= max(own, 1) / max(known.words_median, 1) <= OTHER_LENGTH:
                yield (
                    f"{result.setup.split_name(split)}: the {name} model's replies have {own} words (median), those "
                    f"that the judge was calibrated on {known.words_median} (longest {known.words_max}): its errors "
                    "may be others here"
                )


def _corrections(unlearned: EvaluationResult) -> Iterator[str]:
    """Whose errors were taken out of the harmful rates."""
    known = unlearned.judge.calibration
    if known is not None and unlearned.corrected:
        yield (
            f"harmful rates are corrected by the errors of judge {unlearned.judge.name} on {known.data} "
            f"({known.harmful} harmful and {known.safe} safe replies)"
        )


def _left_out(found: Compared) -> Iterator[str]:
    counts = [result.setup.left_out for result in found.both.values()]
    for reason in dict.fromkeys((*counts[0], *counts[1])):
        before, after = (count.get(reason, 0) for count in counts)
        if before or after:
            count = f"{before}" if before == after else f"{before} (base), {after} (unlearned)"
            yield f"left out: {reason}: {count}"
