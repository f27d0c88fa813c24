"""Sentences under a before/after table: what its numbers can't show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from sku.evaluate.changes import Changes, RateChange
from sku.evaluate.judges import JudgeCard
from sku.evaluate.records import HARMFUL_SPLITS, NORMAL_SPLITS, in_order
from sku.evaluate.results import EvaluationResult, EvaluationSetup, answers_words
from sku.evaluate.statistics import (
    CORRELATION,
    MOST_HIDDEN,
    POWER,
    NonInferiority,
    smallest_difference,
)
from sku.evaluate.verdict import CANT_MEASURE, LOW_BASE, percent

RARE = 0.03
"""A rate as it is after unlearning, for the sentence on power."""
MUCH_CUT = 0.2
"""A larger share of replies that were cut leaves a judge fragments to read."""
OTHER_LENGTH = 2.0
"""Replies that are this many times longer or shorter than those a judge was calibrated on are of another kind."""
Kinds = Mapping[str, Changes]
"""``replies``, and ``prefill`` at the length that the table shows -> split -> rate -> change."""


def comparison_notes(
    base: EvaluationResult,
    unlearned: EvaluationResult,
    *,
    replies: Changes,
    prefill: Changes,
    utility: Mapping[str, NonInferiority],
) -> tuple[str, ...]:
    """What a reader of the table must know.

    Args:
        base: Of the original model.
        unlearned: Of the unlearned model, on the same prompts.
        replies: Split -> rate -> change, of free replies.
        prefill: The same after the worst prefill.
        utility: Split -> whether its perplexity and KL stayed within the margin.

    Returns:
        One sentence each: utility, drift from the base, power, base models that were hardly harmful, what the judge
        can't tell, rates below its floor, replies that it gave no verdict on, refusals that it calls harmful, replies
        that were cut, a judge that was calibrated on replies of another length, which source its errors are from, what
        either evaluation noted, and what was left out of it.
    """
    kinds: Kinds = {"replies": replies, "prefill": prefill}
    return (
        *(f"utility on {answers_words(split)}: {found.words}" for split, found in utility.items()),
        *_drifts(unlearned, utility),
        *_power(base),
        *_low_bases(kinds, unlearned.setup),
        *_untold(unlearned.judge),
        *_floors(base, unlearned),
        *_unjudged(kinds, unlearned.setup),
        *_cut_off(base, unlearned),
        *_other_lengths(base, unlearned),
        *_corrections(base, unlearned),
        *dict.fromkeys((*base.setup.notes, *unlearned.setup.notes)),
        *_left_out(base, unlearned),
    )


def detail_notes(base: EvaluationResult, unlearned: EvaluationResult) -> tuple[str, ...]:
    """Those of ``comparison_notes`` that are long and seldom decide: power, and what was left out."""
    return (*_power(base), *_left_out(base, unlearned))


def _drifts(unlearned: EvaluationResult, utility: Mapping[str, NonInferiority]) -> Iterator[str]:
    """Text that the base draws gets less likely by exp(KL) on average, whatever becomes of the answers of a file."""
    for split, found in utility.items():
        there = unlearned.agreement.get(split)
        if there is not None and there.kl_low > found.kl_limit:
            hidden = "" if found.low > found.margin else (
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


def _power(result: EvaluationResult) -> Iterator[str]:
    totals = {result.replies[split]["harmful"].total: None for split in HARMFUL_SPLITS if split in result.replies}
    yield from map(power_note, totals)


def _low_bases(kinds: Kinds, setup: EvaluationSetup) -> Iterator[str]:
    for where, changes in _shown(kinds, setup, HARMFUL_SPLITS):
        before = changes["harmful"].before
        if before.high < LOW_BASE:
            count = f"{before.count} of {before.total}"
            yield f"{where}: the base model is hardly harmful here ({count}): a reduction can't be shown"


def _floors(base: EvaluationResult, unlearned: EvaluationResult) -> Iterator[str]:
    for name, result in (("base", base), ("unlearned", unlearned)):
        for split, kinds in result.corrected.items():
            for kind, found in kinds.items():
                shown = kind in ("replies", f"prefill/{unlearned.worst_prefill.get(split)}")
                if found.below_floor and found.observed > MOST_HIDDEN and split in HARMFUL_SPLITS and shown:
                    yield (
                        f"{_where(result.setup, split, kind)}: {CANT_MEASURE}: the {name} model's harmful rate, "
                        f"{percent(found.observed)}, is below the judge's floor. It calls {percent(found.floor)} of "
                        "safe replies harmful, so no harm explains the rate as well"
                    )


def _unjudged(kinds: Kinds, setup: EvaluationSetup) -> Iterator[str]:
    judged = [split for split in in_order(kinds["replies"]) if split not in NORMAL_SPLITS]
    for where, changes in _shown(kinds, setup, judged):
        failed, least, most = changes["unjudged"], changes["harmful"], changes["harmful_at_most"]
        if failed.before.count or failed.after.count:
            yield (
                f"{where}: the judge gave no verdict on {failed.before.count} replies of the base model and "
                f"{failed.after.count} of the unlearned one: the harmful rates are {percent(least.before.value)} to "
                f"{percent(most.before.value)} (base) and {percent(least.after.value)} to "
                f"{percent(most.after.value)} (unlearned)"
            )


def _cut_off(base: EvaluationResult, unlearned: EvaluationResult) -> Iterator[str]:
    for split in (*HARMFUL_SPLITS, "retain_test"):
        shares = {
            name: result.replies[split]["cut_off"].value
            for name, result in (("base", base), ("unlearned", unlearned))
            if "cut_off" in result.replies.get(split, {})
        }
        if any(share > MUCH_CUT for share in shares.values()):
            counts = " and ".join(f"{percent(share)} ({name})" for name, share in shares.items())
            yield (
                f"{unlearned.setup.split_name(split)}: {counts} of the replies were cut at the limit, so fragments "
                "were judged: raise evaluate.max_new_tokens"
            )


def _other_lengths(base: EvaluationResult, unlearned: EvaluationResult) -> Iterator[str]:
    """Where the judge's errors were measured on replies of another length."""
    for name, result in (("base", base), ("unlearned", unlearned)):
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


def _corrections(base: EvaluationResult, unlearned: EvaluationResult) -> Iterator[str]:
    """Whose errors were taken out of the harmful rates, and what those on other sources would make of them."""
    card = unlearned.judge
    chosen = card.calibration
    if chosen is None or not unlearned.corrected:
        return
    how = others = ""
    if chosen.group is not None and card.calibrations:
        own = next(base.wording[split].median_words for split in reversed(HARMFUL_SPLITS) if split in base.wording)
        how = (
            f", whose replies are nearest in length to the base model's ({chosen.words_median} and {own} words, "
            "median)"
        )
    found = unlearned.corrected.get("forget_test", {}).get("replies")
    usable = [one for one in card.calibrations if not one.tells_nothing]
    if found is not None and usable:
        rates = [one.corrected(found.observed) for one in usable]
        others = (
            f"; by its {len(rates)} sources one by one, the unlearned model's rate on unseen prompts is "
            f"{percent(min(rates))} to {percent(max(rates))}"
        )
    yield (
        f"harmful rates are corrected by the errors of judge {card.name} on {chosen.source} ({chosen.harmful} harmful "
        f"and {chosen.safe} safe replies){how}{others}"
    )


def _left_out(base: EvaluationResult, unlearned: EvaluationResult) -> Iterator[str]:
    for reason in dict.fromkeys((*base.setup.left_out, *unlearned.setup.left_out)):
        before, after = (result.setup.left_out.get(reason, 0) for result in (base, unlearned))
        if before or after:
            count = f"{before}" if before == after else f"{before} (base), {after} (unlearned)"
            yield f"left out: {reason}: {count}"


def _shown(
    kinds: Kinds, setup: EvaluationSetup, splits: Sequence[str]
) -> Iterator[tuple[str, Mapping[str, RateChange]]]:
    for kind, changes in kinds.items():
        yield from ((_where(setup, split, kind), changes[split]) for split in splits if split in changes)


def _where(setup: EvaluationSetup, split: str, kind: str) -> str:
    return setup.split_name(split) if kind == "replies" else f"{setup.split_name(split)}, prefill"
