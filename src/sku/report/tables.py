"""The before/after table of a comparison, as rows and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sku.evaluate.comparison import Comparison, LeakChange, PerplexityChange, RateChange
from sku.evaluate.leakage import Leak
from sku.evaluate.metrics import Rate

COLUMNS = ("measure", "base", "unlearned", "95 %", "change (95 %)", "wanted")
"""Of the Markdown table; ``95 %`` is the interval of the column before it."""

SPLIT_NAMES = {"unlearned": "trained-on prompts", "unseen": "unseen prompts", "retain_test": "normal prompts"}
"""Split -> what a reader calls it."""

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


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One line of the table; the fields are its columns, in words."""

    section: str
    """What was asked: ``trained-on prompts``, ``unseen prompts, forced start``, ``perplexity``, ..."""
    measure: str
    before: str
    after: str
    interval: str
    """95 % interval of ``after``; of the ratio for a perplexity."""
    change: str
    """Difference in points, or ratio, with its 95 % interval."""
    wanted: str
    """``down``, ``up``, ``same`` or empty where neither is better."""

    @property
    def label(self) -> str:
        """Section and measure in one."""
        return f"{self.section}: {self.measure}"


def before_after_rows(comparison: Comparison) -> list[TableRow]:
    """The whole comparison: replies to harmful prompts, forced starts, drawn replies, normal prompts, perplexities.

    Args:
        comparison: From ``compare``.

    Returns:
        Rows in reading order; what was not measured has none.
    """
    rows: list[TableRow] = []
    for split in ("unlearned", "unseen"):
        rows += _rate_rows(SPLIT_NAMES[split], comparison.replies.get(split, {}), _REPLY_MEASURES)
    for split in ("unlearned", "unseen"):
        name = f"{SPLIT_NAMES[split]}, forced start"
        rows += _rate_rows(name, comparison.prefill.get(split, {}), _REPLY_MEASURES[:1])
    for split in ("unlearned", "unseen"):
        name = f"{SPLIT_NAMES[split]}, drawn replies"
        rows += _rate_rows(name, comparison.samples.get(split, {}), _REPLY_MEASURES[:1])
        rows += _leak_rows(name, comparison.leak.get(split, {}))
    rows += _rate_rows(SPLIT_NAMES["retain_test"], comparison.replies.get("retain_test", {}), _NORMAL_MEASURES)
    rows += _perplexity_rows(comparison.perplexity)
    return rows


def markdown_table(rows: Iterable[TableRow]) -> str:
    """The rows as a Markdown table that ends with a newline."""
    lines = [COLUMNS, ("---", "---:", "---:", "---:", "---:", "---")]
    lines += [(row.label, row.before, row.after, row.interval, row.change, row.wanted) for row in rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def percent(share: float) -> str:
    """A share as a percentage with one decimal: ``12.5 %``."""
    return f"{100 * share:.1f} %"


def _leak_rows(name: str, changes: Mapping[str, LeakChange]) -> Iterator[TableRow]:
    """The row of the largest k: any of that many drawn replies."""
    for k in sorted(changes, key=int)[-1:]:
        if int(k) > 1:
            yield _share_row(name, f"harmful in at least one of {k}", changes[k], "down")


def _rate_rows(
    name: str, changes: Mapping[str, RateChange], measures: Sequence[tuple[str, str, str]]
) -> Iterator[TableRow]:
    for key, words, wanted in measures:
        if key in changes:
            yield _share_row(name, words, changes[key], wanted)


def _share_row(name: str, words: str, change: RateChange | LeakChange, wanted: str) -> TableRow:
    return TableRow(
        section=name,
        measure=words,
        before=percent(change.before.value),
        after=percent(change.after.value),
        interval=_interval(change.after),
        change=f"{100 * change.difference:+.1f} ({100 * change.low:+.1f} to {100 * change.high:+.1f}) points",
        wanted=wanted,
    )


def _interval(rate: Rate | Leak) -> str:
    return f"{100 * rate.low:.1f} to {100 * rate.high:.1f}"


def _perplexity_rows(changes: Mapping[str, PerplexityChange]) -> Iterator[TableRow]:
    for split, measure, wanted in (
        ("retain_test", "normal answers", "same"),
        ("benign", "benign answers", "same"),
        ("unlearned", "trained-on harmful answers", "up"),
        ("unseen", "unseen harmful answers", "up"),
    ):
        if split in changes:
            change = changes[split]
            yield TableRow(
                section="perplexity",
                measure=measure,
                before=f"{change.before:.4g}",
                after=f"{change.after:.4g}",
                interval=f"\u00d7{change.low:.4g} to \u00d7{change.high:.4g}",
                change=f"\u00d7{change.ratio:.4g} ({change.low:.4g} to {change.high:.4g})",
                wanted=wanted,
            )
