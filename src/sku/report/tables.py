"""The before/after table of a comparison, as rows and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from sku.evaluate.comparison import Comparison, LeakChange, PerplexityChange, RateChange, untold
from sku.evaluate.judges import JudgeCard
from sku.evaluate.leakage import Leak
from sku.evaluate.metrics import Rate
from sku.evaluate.records import HARMFUL, NORMAL_SPLITS, in_order
from sku.evaluate.results import answers_words
from sku.evaluate.statistics import MOST_HIDDEN, CorrectedRate
from sku.evaluate.verdict import CANT_MEASURE
from sku.report.table_rows import TableRow as TableRow
from sku.report.utility_tables import utility_rows

NOTHING = "\u2013"
COLUMNS = ("measure", "base", "unlearned", "95 %", "change (95 %)", "p (Holm)", "wanted")
"""Of the Markdown table; ``95 %`` is the interval of the column before it."""

_REPLY_MEASURES = (
    ("harmful", "harmful", "down"),
    ("harmful_ungated", "harmful, ungated", "down"),
    ("refusal", "refusal", ""),
    ("safe_answer", "safe answer", ""),
    ("evasive", "evasive", ""),
    ("degenerate", "gibberish", "same"),
)
_NORMAL_MEASURES = (
    ("exact_answer", "exact answer", "same"),
    ("over_refusal", "refused", "same"),
    ("degenerate", "gibberish", "same"),
)


def before_after_rows(comparison: Comparison) -> list[TableRow]:
    """The whole comparison: harmful prompts, the worst prefill, drawn replies, normal prompts, perplexities and more.

    Args:
        comparison: From ``compare``.

    Returns:
        Rows in reading order; what was not measured, or is 0 under this judge whatever a model says, has none. A
        harmful rate that the judge can't measure says so in place of its change.
    """
    rows: list[TableRow] = []
    named, judge = comparison.unlearned.setup.split_name, comparison.unlearned.judge
    asked = in_order(("unlearned", "unseen", "retain_test", *comparison.replies))
    for split in asked:
        if split in ("unlearned", "unseen") or split.startswith(HARMFUL):
            rows += _rate_rows(named(split), comparison.replies.get(split, {}), _REPLY_MEASURES, judge)
            rows += _same_reply_rows(comparison, split)
            if split == "unseen":
                rows += _length_rows(comparison, split)
            rows += _corrected_rows(named(split), comparison, split, "replies")
            rows += _judge_rows(named(split), comparison, split)
    rows += _kappa_rows(comparison)
    for split in ("unlearned", "unseen"):
        if split in comparison.prefill:
            name = f"{named(split)}, {comparison.prefill_label(split)}"
            rows += _rate_rows(name, comparison.prefill[split], _REPLY_MEASURES[:1], judge)
            rows += _corrected_rows(name, comparison, split, f"prefill/{comparison.unlearned.worst_prefill[split]}")
    for split in ("unlearned", "unseen"):
        name = f"{named(split)}, drawn"
        rows += _rate_rows(name, comparison.samples.get(split, {}), _REPLY_MEASURES[:1], judge)
        rows += _leak_rows(name, comparison.leak.get(split, {}), judge)
    for split in asked:
        if split in NORMAL_SPLITS or split == "xstest_unsafe":
            measures = _NORMAL_MEASURES if split in NORMAL_SPLITS else _REPLY_MEASURES
            rows += _rate_rows(named(split), comparison.replies.get(split, {}), measures, judge)
            if split == "retain_test":
                rows += _length_rows(comparison, split)
    rows += _perplexity_rows(comparison.perplexity, comparison.unlearned.setup.answers_name())
    rows += utility_rows(comparison)
    return rows


def markdown_table(rows: Iterable[TableRow]) -> str:
    """The rows as a Markdown table that ends with a newline."""
    lines = [COLUMNS, ("---", "---:", "---:", "---:", "---:", "---:", "---")]
    lines += [(row.label, row.before, row.after, row.interval, row.change, row.p_holm, row.wanted) for row in rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def percent(share: float) -> str:
    """A share as a percentage with one decimal: ``12.5 %``."""
    return f"{100 * share:.1f} %"


def caution_of(judge: JudgeCard, change: RateChange | LeakChange, *, replies: int = 1) -> str:
    """What stands beside a harmful rate that the judge can't measure, before or after; nothing beside another."""
    measured = (judge.can_measure(side.value, side.low, replies=replies) for side in (change.before, change.after))
    return "" if all(measured) else CANT_MEASURE


def _rate_rows(
    name: str, changes: Mapping[str, RateChange], measures: Sequence[tuple[str, str, str]], judge: JudgeCard
) -> Iterator[TableRow]:
    for key, words, wanted in measures:
        if key in changes and key not in untold(judge):
            caution = caution_of(judge, changes[key]) if key.startswith("harmful") else ""
            yield _share_row(name, words, changes[key], wanted, caution)


def _leak_rows(name: str, changes: Mapping[str, LeakChange], judge: JudgeCard) -> Iterator[TableRow]:
    """The row of the largest k: any of that many drawn replies."""
    for k in sorted(changes, key=int)[-1:]:
        if int(k) > 1:
            caution = caution_of(judge, changes[k], replies=int(k))
            yield _share_row(name, f"harmful, any of {k}", changes[k], "down", caution)


def _share_row(name: str, words: str, change: RateChange | LeakChange, wanted: str, caution: str) -> TableRow:
    points = f"{100 * change.difference:+.1f} ({100 * change.low:+.1f} to {100 * change.high:+.1f}) points"
    return TableRow(
        section=name,
        measure=words,
        before=percent(change.before.value),
        after=percent(change.after.value),
        interval=interval(change.after),
        change=caution or points,
        wanted=wanted,
        p_holm="" if change.p_holm is None else f"{change.p_holm:.2g}",
        caution=caution,
    )


def _same_reply_rows(comparison: Comparison, split: str) -> Iterator[TableRow]:
    before, after = (result.wording.get(split) for result in (comparison.base, comparison.unlearned))
    if before is not None and after is not None:
        yield TableRow(
            section=comparison.unlearned.setup.split_name(split),
            measure="commonest reply",
            before=percent(before.same_reply),
            after=percent(after.same_reply),
            interval="",
            change=f"{100 * (after.same_reply - before.same_reply):+.1f} points",
            wanted="",
        )


def _length_rows(comparison: Comparison, split: str) -> Iterator[TableRow]:
    """How many replies were cut at ``max_new_tokens``, and how long they are: who learns to stop early says less."""
    name = comparison.unlearned.setup.split_name(split)
    yield from _rate_rows(
        name, comparison.replies.get(split, {}), (("cut_off", "cut at the limit", ""),), comparison.unlearned.judge
    )
    before, after = (result.wording.get(split) for result in (comparison.base, comparison.unlearned))
    if before is not None and after is not None:
        yield TableRow(
            section=name,
            measure="tokens of a reply, mean",
            before=f"{before.mean_tokens:.1f}",
            after=f"{after.mean_tokens:.1f}",
            interval="",
            change=f"{after.mean_tokens - before.mean_tokens:+.1f}",
            wanted="",
        )


def _corrected_rows(section: str, comparison: Comparison, split: str, kind: str) -> Iterator[TableRow]:
    """One row where the judge was calibrated; notes say where it lies below the judge's floor."""
    before, after = (result.corrected.get(split, {}).get(kind) for result in (comparison.base, comparison.unlearned))
    if before is not None and after is not None:
        calibration = comparison.unlearned.judge.calibration
        group = None if calibration is None else calibration.group
        unmeasured = any(side.below_floor and side.observed > MOST_HIDDEN for side in (before, after))
        yield TableRow(
            section=section,
            measure="harmful, judge corrected" + ("" if group is None else f" by {group}"),
            before=percent(before.value),
            after=percent(after.value),
            interval=interval(after),
            change=CANT_MEASURE if unmeasured else f"{100 * (after.value - before.value):+.1f} points",
            wanted="down",
            caution=CANT_MEASURE if unmeasured else "",
        )


def _judge_rows(section: str, comparison: Comparison, split: str) -> Iterator[TableRow]:
    """Of a vote: what each of its judges alone says."""
    before, after = (result.judge_agreement for result in (comparison.base, comparison.unlearned))
    if before is None or after is None:
        return
    for judge in after.judges:
        old, new = (found.rates[judge].get(split, {}).get("harmful") for found in (before, after))
        if old is not None and new is not None:
            yield TableRow(
                section=section,
                measure=f"harmful, {judge} alone",
                before=percent(old.value),
                after=percent(new.value),
                interval=interval(new),
                change=f"{100 * (new.value - old.value):+.1f} points",
                wanted="down",
            )


def _kappa_rows(comparison: Comparison) -> Iterator[TableRow]:
    """Of a vote: how far its judges agree beyond chance on replies to harmful prompts, and on how many they part."""
    before, after = (result.judge_agreement for result in (comparison.base, comparison.unlearned))
    if before is None or after is None:
        return
    kappas = [NOTHING if found.kappa is None else f"{found.kappa:.2f}" for found in (before, after)]
    disputed = [f"{found.disagreement_count} of {found.judged_by_all}" for found in (before, after)]
    section = f"judges {', '.join(after.judges)}"
    for measure, (old, new) in (("kappa", kappas), ("disputed replies", disputed)):
        yield TableRow(section=section, measure=measure, before=old, after=new, interval="", change="", wanted="")


def interval(rate: Rate | CorrectedRate | Leak) -> str:
    """Bounds of a share in per cent: ``7.4 to 16.1``."""
    return f"{100 * rate.low:.1f} to {100 * rate.high:.1f}"


def _perplexity_rows(changes: Mapping[str, PerplexityChange], unlearned: str) -> Iterator[TableRow]:
    harmful = {"unlearned": f"{unlearned} harmful answers", "unseen": "unseen harmful answers"}
    for split, change in changes.items():
        yield TableRow(
            section="perplexity",
            measure=harmful.get(split) or answers_words(split),
            before=f"{change.before:.4g}",
            after=f"{change.after:.4g}",
            interval=f"\u00d7{change.low:.4g} to \u00d7{change.high:.4g}",
            change=f"\u00d7{change.ratio:.4g} ({change.low:.4g} to {change.high:.4g})",
            wanted="up" if split in harmful else "same",
        )
