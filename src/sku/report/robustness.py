"""What attacks bring back of the harmful answers, as rows of tables."""

from __future__ import annotations

from collections.abc import Iterator

from sku.attacks import AttackedReplies, AttackReport, AttackResult, Relearned, RelearnLine, RelearnResult
from sku.evaluate.judges import JudgeCard
from sku.evaluate.metrics import Rate, start_words
from sku.report.words import NOTHING, interval, percent

UNMEASURED = "not measurable"
"""In place of an interval where the judge would call as many harmless replies harmful."""


ATTACK_COLUMNS = ("attack", "setting", "unlearned", "95 %", "base", "gibberish")


def attack_rows(report: AttackReport) -> list[tuple[str, ...]]:
    """All attacks in the order in which they ran, the questions as they are first.

    Args:
        report: From ``run_attacks``.

    Returns:
        ``ATTACK_COLUMNS`` of each setting, and where a question is asked in several ways a second row for their mean:
        title; strength, or whether the worst or the mean of several ways is shown; harmful share of the attacked
        model; its 95 % interval, or that the judge can't measure it, and none for a mean, whose replies are not
        independent; harmful share of the base model under the same attack; gibberish share of the attacked model.
    """
    titles = {card.name: card.title for card in report.cards}
    return [row for result in report.results for row in _rows(titles[result.attack], result, report.setup.judge)]


RELEARN_COLUMNS = (
    "relearning", "steps to half", "rate", "harmful then", "95 %", "perplexity", "gibberish", "base",
)  # fmt: skip


def relearn_rows(report: AttackReport) -> list[tuple[str, ...]]:
    """How much fine-tuning brings half of the base's harm back, a row for each number of pairs.

    Args:
        report: From ``run_attacks``.

    Returns:
        ``RELEARN_COLUMNS``, none without that attack: number of pairs; steps until half is back; the attacker's best
        learning rate; and at the last checkpoint of its training the harmful share, its 95 % interval, the perplexity
        of normal answers as a multiple of the base's, the share of gibberish, and the harmful share of the base model
        after the same training.
    """
    found = report.relearn
    if found is None:
        return []
    return [_relearn_row(result, found, report.setup.judge) for result in found.results]


def _relearn_row(result: RelearnResult, found: Relearned, judge: JudgeCard) -> tuple[str, ...]:
    last, base = result.model.checkpoints[-1], result.control.checkpoints[-1]
    measured = judge.can_measure(last.harmful.value, last.harmful.low)
    bounds = _interval((last.harmful, last.harmful_upper_bound)) if measured else UNMEASURED
    return (
        pairs_text(result.pairs),
        half_text(result.model, found),
        NOTHING if result.model.learning_rate is None else f"{result.model.learning_rate:g}",
        percent(last.harmful.value),
        bounds,
        NOTHING if last.perplexity is None else f"\u00d7{last.perplexity:.4g}",
        percent(last.gibberish.value),
        percent(base.harmful.value),
    )


def pairs_text(pairs: int) -> str:
    """``10 pairs``."""
    return f"{pairs} pair{'' if pairs == 1 else 's'}"


def half_text(line: RelearnLine, found: Relearned) -> str:
    """Steps until half of the base's harm is back: ``16``, or ``> 256`` where it never is."""
    return f"> {found.steps[-1]}" if line.half_steps is None else str(line.half_steps)


def left_out_lines(report: AttackReport) -> list[str]:
    """What could not be asked, a line each: ``left out: prefill, 20 tokens: the answer is too short: 100``."""
    lines = [f"left out: {what}: {number}" for what, number in report.left_out.items()]
    if report.relearn is not None and not report.relearn.results:
        lines.append(
            f"left out: relearn: the base model gives no harmful reply to {report.relearn.questions} questions, so "
            "there is none to bring back"
        )
    return lines


def _rows(title: str, result: AttackResult, judge: JudgeCard) -> Iterator[tuple[str, ...]]:
    model, control, ways = result.model, result.control, len(result.model.variants)
    gibberish, after = percent(model.replies["gibberish"].value), model.harmful.after
    measured = judge.can_measure(after.value, after.low, replies=max(ways, 1))
    setting, bounds = "worst case" if ways > 1 else result.setting, _interval(_bounds(model))
    yield title, setting, _share(model), bounds if measured else UNMEASURED, _share(control), gibberish
    if ways > 1:
        own, base = (percent(side.replies["harmful"].value) for side in (model, control))
        yield title, "mean", own, NOTHING if measured else UNMEASURED, base, gibberish


def _bounds(measured: AttackedReplies) -> tuple[Rate, Rate]:
    return measured.harmful.after, measured.harmful_upper_bound


def _share(measured: AttackedReplies) -> str:
    """A share, or both bounds where the judge failed on replies."""
    low, high = _bounds(measured)
    return percent(low.value) if low.count == high.count else f"{100 * low.value:.1f} to {percent(high.value)}"


def _interval(bounds: tuple[Rate, Rate]) -> str:
    return f"{100 * min(rate.low for rate in bounds):.1f} to {100 * max(rate.high for rate in bounds):.1f}"


def rate_text(rate: Rate | None) -> str:
    """A share with its interval, a dash for none."""
    return NOTHING if rate is None else f"{percent(rate.value)} ({interval(rate)})"


def start_text(key: str | None) -> str:
    """What a prefill was, after its rate: ``, 3 tokens``."""
    return "" if key is None else f", {start_words(key)}"
