"""Attacks as a table: what each brings back of the harmful answers, beside what it does to the base model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sku.attacks.results import AttackReport, AttackResult, Measured
from sku.evaluate.judges import JudgeCard
from sku.evaluate.metrics import Rate
from sku.report.tables import percent

NOTHING = "\u2013"
UNMEASURED = "not measurable"
"""In place of an interval where the judge would call as many harmless replies harmful."""


@dataclass(frozen=True, kw_only=True)
class AttackRow:
    """One line of the table; the fields are its columns, in words."""

    attack: str
    setting: str
    """Strength of the attack; where there are several ways to ask, whether the worst or the mean of them is shown."""
    unlearned: str
    """Harmful share of the attacked model."""
    interval: str
    """Its 95 % interval, or that the judge can't measure it; none for a mean, whose replies are not independent."""
    base: str
    """Harmful share of the base model under the same attack."""
    gibberish: str
    """Gibberish share of the attacked model's replies."""


def attack_rows(report: AttackReport) -> list[AttackRow]:
    """All attacks in the order in which they ran, the questions as they are first.

    Args:
        report: From ``run_attacks``.

    Returns:
        A row for each setting, and where a question is asked in several ways a second one for their mean.
    """
    titles = {card.name: card.title for card in report.cards}
    return [row for result in report.results for row in _rows(titles[result.attack], result, report.setup.judge)]


def left_out_lines(report: AttackReport) -> list[str]:
    """What could not be asked, a line each: ``left out: prefill, 20 tokens: the answer is too short: 100``."""
    return [f"left out: {what}: {number}" for what, number in report.left_out.items()]


def _rows(title: str, result: AttackResult, judge: JudgeCard) -> Iterator[AttackRow]:
    model, control, ways = result.model, result.control, len(result.model.variants)
    gibberish = percent(model.replies["degenerate"].value)
    yield AttackRow(
        attack=title,
        setting="worst case" if ways > 1 else result.setting,
        unlearned=_share(model),
        interval=_interval(_bounds(model)) if _is_measured(judge, model, max(ways, 1)) else UNMEASURED,
        base=_share(control),
        gibberish=gibberish,
    )
    if ways > 1:
        yield AttackRow(
            attack=title,
            setting="mean",
            unlearned=percent(model.replies["harmful"].value),
            interval=NOTHING if _is_measured(judge, model, max(ways, 1)) else UNMEASURED,
            base=percent(control.replies["harmful"].value),
            gibberish=gibberish,
        )


def _is_measured(judge: JudgeCard, measured: Measured, ways: int) -> bool:
    return judge.can_measure(measured.harmful.after.value, measured.harmful.after.low, replies=ways)


def _bounds(measured: Measured) -> tuple[Rate, Rate]:
    return measured.harmful.after, measured.harmful_at_most


def _share(measured: Measured) -> str:
    """A share, or both bounds where the judge failed on replies."""
    low, high = _bounds(measured)
    return percent(low.value) if low.count == high.count else f"{100 * low.value:.1f} to {percent(high.value)}"


def _interval(bounds: Sequence[Rate]) -> str:
    return f"{100 * min(rate.low for rate in bounds):.1f} to {100 * max(rate.high for rate in bounds):.1f}"
