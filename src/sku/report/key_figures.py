"""The few figures of a run that a reader looks at first: on its page, on its card and, in numbers, on the hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from sku.evaluate.changes import LeakChange, PerplexityChange, RateChange
from sku.evaluate.comparison import Comparison
from sku.evaluate.metrics import prefill_words
from sku.report.tables import caution_of, interval, most_sampled, percent

Kind = Literal["replies", "prefill", "leak", "perplexity"]
Wanted = Literal["down", "up", "same"]
Measure = tuple[Kind, str, str, str, Wanted]
"""Kind of reply, split, rate, what a reader calls it (``{unlearned}`` by its own name, ``{k}`` sampled replies), and
what is wanted of it."""
Change = RateChange | LeakChange | PerplexityChange
ON_PAGE: tuple[Measure, ...] = (
    ("replies", "forget_test", "harmful", "harmful, unseen prompts", "down"),
    ("prefill", "forget_test", "harmful", "harmful, unseen prompts", "down"),
    ("leak", "forget_test", "harmful", "harmful, any of {k} sampled replies, unseen prompts", "down"),
    ("replies", "forget_train", "harmful", "harmful, {unlearned}", "down"),
    ("replies", "forget_test", "gibberish", "gibberish, unseen prompts", "same"),
    ("replies", "retain_test", "exact_answer", "exact answers, normal prompts", "same"),
    ("replies", "retain_test", "over_refusal", "refused, normal prompts", "same"),
    ("perplexity", "retain_test", "ratio", "perplexity of normal answers, to the base's", "same"),
)
"""Harm first, then what it cost."""
ON_CARD: tuple[Measure, ...] = (
    *ON_PAGE,
    ("prefill", "forget_train", "harmful", "harmful, {unlearned}", "down"),
    ("replies", "forget_test", "cut_off", "cut at the limit, unseen prompts", "same"),
    ("replies", "retain_test", "cut_off", "cut at the limit, normal prompts", "same"),
    ("perplexity", "forget_test", "ratio", "perplexity of unseen harmful answers, to the base's", "up"),
)
"""What stands beside the page's, where there is no table to look them up."""


@dataclass(frozen=True, kw_only=True)
class KeyFigure:
    """One figure before and after, with the 95 % interval of what it is after."""

    name: str
    """For pairing runs: figures of one name are of the same measure."""
    split: str
    metric: str
    """Such as ``harmful_replies``."""
    words: str
    detail: str
    """What differs from run to run: the length of the worst prefill; empty for most."""
    wanted: Wanted
    change: Change
    caution: str
    """Why it can't be taken as it stands; empty for most."""

    @property
    def label(self) -> str:
        """Words and detail in one."""
        return f"{self.words} ({self.detail})" if self.detail else self.words

    @property
    def is_share(self) -> bool:
        """Whether it is a share, and no ratio of perplexities."""
        return not isinstance(self.change, PerplexityChange)

    @property
    def numbers(self) -> tuple[float, float, float]:
        """Lower bound, value and upper bound after: of a share, or of a perplexity as a ratio to the base's."""
        if isinstance(self.change, PerplexityChange):
            return self.change.low, self.change.ratio, self.change.high
        return self.change.after.low, self.change.after.value, self.change.after.high

    @property
    def before(self) -> str:
        """The base's."""
        return "\u00d71" if isinstance(self.change, PerplexityChange) else percent(self.change.before.value)

    @property
    def after(self) -> str:
        """The unlearned model's."""
        return percent(self.numbers[1]) if self.is_share else f"\u00d7{self.numbers[1]:.4g}"

    @property
    def bounds(self) -> str:
        """Interval of ``after``."""
        if isinstance(self.change, PerplexityChange):
            return f"{self.change.low:.4g} to {self.change.high:.4g}"
        return interval(self.change.after)


def key_figures(comparison: Comparison, measures: Iterable[Measure] = ON_PAGE) -> Iterator[KeyFigure]:
    """Figures of a run, in the order of the measures.

    Args:
        comparison: Of the run.
        measures: Which; ``ON_PAGE`` or ``ON_CARD``.

    Yields:
        What was measured of them.
    """
    unlearned = comparison.unlearned.setup.split_name("forget_train")
    for kind, split, rate, words, wanted in measures:
        tried = sorted(map(int, comparison.unlearned.prefill.get(split, ()))) if kind == "prefill" else []
        for k, change, caution in _measured(comparison, kind, split, rate):
            shown, detail = words.format(unlearned=unlearned, k=k), ""
            if kind == "prefill":
                shown = f"{shown}, {prefill_words(tried)}"
                worst = prefill_words([comparison.unlearned.worst_prefill[split]])
                detail = worst.removeprefix("prefill, ") if len(tried) > 1 else ""
            yield KeyFigure(
                name="/".join(filter(None, (kind, split, rate, k, *map(str, tried)))),
                split=split,
                metric=f"{rate}_{kind}",
                words=shown,
                detail=detail,
                wanted=wanted,
                change=change,
                caution=caution,
            )


def _measured(comparison: Comparison, kind: Kind, split: str, rate: str) -> Iterator[tuple[str, Change, str]]:
    """Number of sampled replies as a word, change and caution; nothing where it was not measured."""
    if kind == "leak":
        yield from most_sampled(comparison, split)
    elif kind == "perplexity":
        if split in comparison.perplexity:
            yield "", comparison.perplexity[split], ""
    else:
        change = (comparison.prefill if kind == "prefill" else comparison.replies).get(split, {}).get(rate)
        if change is not None:
            yield "", change, caution_of(comparison.unlearned.judge, change) if rate == "harmful" else ""
