"""Before and after: the table of a comparison as rows, and the few figures that a reader looks at first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sku.evaluate.comparison import Comparison, untold
from sku.evaluate.judges import JudgeCard
from sku.evaluate.metrics import HARM_WORDS, RateChange, prefill_words, start_words
from sku.evaluate.records import BORDERLINE, HARMFUL, answers_words, in_order
from sku.evaluate.results import BaseAgreement, LeakChange, PerplexityChange, ScoreChange, TaskScores, main_metric
from sku.evaluate.statistics import MOST_HIDDEN
from sku.evaluate.verdict import CANT_MEASURE
from sku.report.words import TableRow, before_after, in_points, interval, percent

_HARM = tuple((rate, words, "down") for rate, words in HARM_WORDS.items())
_REPLY_MEASURES = (
    *_HARM,
    ("refusal", "refusal", ""),
    ("safe_answer", "safe answer", ""),
    ("evasive", "evasive", ""),
    ("gibberish", "gibberish", "same"),
)
_SIMILARITY_NAMES = {"rouge_l": "ROUGE-L", "learned": "learned similarity"}
_NORMAL_MEASURES = (
    ("exact_answer", "exact answer", "same"),
    ("over_refusal", "refused", "same"),
    ("gibberish", "gibberish", "same"),
)
Kind = Literal["replies", "prefill", "leak", "perplexity"]
Wanted = Literal["down", "up", "same"]
Measure = tuple[Kind, str, str, str, Wanted]
"""Kind of reply, split, rate, what a reader calls it (``{unlearned}`` by its own name, ``{k}`` sampled replies,
``{harm}`` the harmful rate that decides), and what is wanted of it."""
Change = RateChange | LeakChange | PerplexityChange


def _harm_measures(kind: Kind, split: str, prompts: str) -> tuple[Measure, ...]:
    """The judge's own word, then the rules'."""
    return tuple((kind, split, rate, f"{words}, {prompts}", "down") for rate, words in HARM_WORDS.items())


ON_PAGE: tuple[Measure, ...] = (
    *_harm_measures("replies", "forget_test", "unseen prompts"),
    *_harm_measures("prefill", "forget_test", "unseen prompts"),
    ("leak", "forget_test", "harmful", "{harm}, any of {k} sampled replies, unseen prompts", "down"),
    *_harm_measures("replies", "forget_train", "{unlearned}"),
    ("replies", "forget_test", "gibberish", "gibberish, unseen prompts", "same"),
    ("replies", "retain_test", "exact_answer", "exact answers, normal prompts", "same"),
    ("replies", "retain_test", "over_refusal", "refused, normal prompts", "same"),
    ("replies", BORDERLINE, "over_refusal", "refused, borderline prompts", "same"),
    ("perplexity", "retain_test", "ratio", "perplexity of normal answers, to the base's", "same"),
)
"""Harm first, then what it cost."""
ON_CARD: tuple[Measure, ...] = (
    *ON_PAGE,
    *_harm_measures("prefill", "forget_train", "{unlearned}"),
    ("replies", "forget_test", "cut_off", "cut at the limit, unseen prompts", "same"),
    ("replies", "retain_test", "cut_off", "cut at the limit, normal prompts", "same"),
    ("perplexity", "forget_test", "ratio", "perplexity of unseen harmful answers, to the base's", "up"),
)
"""What stands beside the page's, where there is no table to look them up."""


def before_after_rows(comparison: Comparison) -> list[TableRow]:
    """The whole comparison in reading order: harmful prompts, the worst prefill, sampled replies, normal ones, ...

    What was not measured, or is 0 under this judge whatever a model says, has no row. A harmful rate that the judge
    can't measure says so in place of its change. Sections say how many prompts their rates are of, where the judge
    gave no verdict on some.
    """
    rows: list[TableRow] = []
    setup, judge = comparison.unlearned.setup, comparison.unlearned.judge

    def named(split: str, changes: Mapping[str, RateChange]) -> str:
        return f"{setup.split_name(split)}{_with_verdict(changes)}"

    asked = in_order(("forget_train", "forget_test", "retain_test", *comparison.replies))
    for split in asked:
        if split in ("forget_train", "forget_test") or split.startswith(HARMFUL):
            changes = comparison.replies.get(split, {})
            name = named(split, changes)
            rows += _rate_rows(name, changes, _REPLY_MEASURES, judge)
            rows += _same_reply_rows(name, comparison, split)
            if split == "forget_test":
                rows += _length_rows(name, comparison, split)
            rows += _corrected_rows(name, comparison, split, "replies")
    for split in ("forget_train", "forget_test"):
        if split in comparison.prefill:
            changes = comparison.prefill[split]
            name = f"{setup.split_name(split)}, {comparison.prefill_label(split)}{_with_verdict(changes)}"
            rows += _rate_rows(name, changes, _HARM, judge)
            rows += _corrected_rows(name, comparison, split, f"prefill/{comparison.unlearned.worst_prefill[split]}")
    for split in ("forget_train", "forget_test"):
        name = f"{setup.split_name(split)}, sampled"
        rows += _rate_rows(name, comparison.samples.get(split, {}), _HARM, judge)
        rows += [
            _change_row(name, f"{HARM_WORDS[comparison.rate]}, any of {k}", change, "down", caution)
            for k, change, caution in most_sampled(comparison, split)
        ]
    for category, changes in comparison.normal.items():
        rows += _rate_rows(named(category, {}), changes, _NORMAL_MEASURES, judge)
        if category == "retain_test":
            rows += _length_rows(named(category, {}), comparison, category)
    unsafe = comparison.replies.get("xstest_unsafe", {})
    rows += _rate_rows(named("xstest_unsafe", unsafe), unsafe, _REPLY_MEASURES, judge)
    rows += _perplexity_rows(comparison.perplexity, comparison.unlearned.setup.answers_name())
    rows += utility_rows(comparison)
    return rows


def _with_verdict(changes: Mapping[str, RateChange]) -> str:
    """How many prompts the rates are of, where the judge gave no verdict on some; nothing elsewhere."""
    asked, counted = changes.get("no_verdict"), changes.get("harmful")
    if asked is None or counted is None or counted.after.total == asked.after.total:
        return ""
    return f" ({counted.after.total} of {asked.after.total} with a verdict)"


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
            yield _change_row(name, words, changes[key], wanted, caution)


def most_sampled(comparison: Comparison, split: str) -> Iterator[tuple[str, LeakChange, str]]:
    """The largest k, how likely any of so many sampled replies is harmful, and its caution; none for k = 1."""
    changes = comparison.leak.get(split, {})
    for k in sorted(changes, key=int)[-1:]:
        if int(k) > 1:
            yield k, changes[k], caution_of(comparison.unlearned.judge, changes[k], replies=int(k))


def _change_row(name: str, words: str, change: RateChange | LeakChange, wanted: str, caution: str) -> TableRow:
    before, after, points = before_after(change)
    p_holm = "" if change.p_holm is None else f"{change.p_holm:.2g}"
    bounds = interval(change.after)
    return TableRow(name, words, before, after, bounds, caution or f"{points} points", wanted, p_holm, caution)


def _share_row(section: str, measure: str, before: float, after: float, **columns: str) -> TableRow:
    """A row of a share; its change is in points, where the other columns don't say another."""
    columns = {"change": f"{100 * (after - before):+.1f} points", **columns}
    return TableRow(section, measure, percent(before), percent(after), **columns)


def _same_reply_rows(section: str, comparison: Comparison, split: str) -> Iterator[TableRow]:
    before, after = (result.wording.get(split) for result in (comparison.base, comparison.unlearned))
    if before is not None and after is not None:
        yield _share_row(section, "most frequent reply", before.same_reply, after.same_reply)


def _length_rows(name: str, comparison: Comparison, split: str) -> Iterator[TableRow]:
    """How many replies were cut at ``max_new_tokens``, and how long they are: who learns to stop early says less."""
    yield from _rate_rows(
        name, comparison.by_category.get(split, {}), (("cut_off", "cut at the limit", ""),), comparison.unlearned.judge
    )
    before, after = (result.wording.get(split) for result in (comparison.base, comparison.unlearned))
    if before is not None and after is not None:
        change = f"{after.mean_tokens - before.mean_tokens:+.1f}"
        sides = f"{before.mean_tokens:.1f}", f"{after.mean_tokens:.1f}"
        yield TableRow(name, "tokens of a reply, mean", *sides, change=change)


def _corrected_rows(section: str, comparison: Comparison, split: str, kind: str) -> Iterator[TableRow]:
    """One row where the judge was calibrated; notes say where it lies below the judge's floor."""
    before, after = (result.corrected.get(split, {}).get(kind) for result in (comparison.base, comparison.unlearned))
    if before is not None and after is not None:
        measure = f"{HARM_WORDS[comparison.rate]}, corrected"
        unmeasured = any(side.below_floor and side.observed > MOST_HIDDEN for side in (before, after))
        told = {"change": CANT_MEASURE, "caution": CANT_MEASURE} if unmeasured else {}
        yield _share_row(section, measure, before.value, after.value, interval=interval(after), wanted="down", **told)


def _perplexity_rows(changes: Mapping[str, PerplexityChange], unlearned: str) -> Iterator[TableRow]:
    harmful = {"forget_train": f"{unlearned} harmful answers", "forget_test": "unseen harmful answers"}
    for split, change in changes.items():
        sides = f"{change.before:.4g}", f"{change.after:.4g}"
        bounds = f"\u00d7{change.low:.4g} to \u00d7{change.high:.4g}"
        ratio = f"\u00d7{change.ratio:.4g} ({change.low:.4g} to {change.high:.4g})"
        measure, wanted = harmful.get(split) or answers_words(split), "up" if split in harmful else "same"
        yield TableRow("perplexity", measure, *sides, bounds, ratio, wanted)


def utility_rows(comparison: Comparison) -> Iterator[TableRow]:
    """Agreement with the base, similarity to the dataset's answers, and the harness's tasks, as far as measured."""
    yield from _agreement_rows(comparison.unlearned.agreement)
    yield from _similarity_rows(comparison.similarity)
    yield from _harness_rows(comparison)


def _agreement_rows(agreement: Mapping[str, BaseAgreement]) -> Iterator[TableRow]:
    """The base agrees with itself: divergence 0, the same first token everywhere."""
    whole = "same as base"
    for split in in_order(agreement):
        found, section = agreement[split], f"{whole}, {answers_words(split)}"
        bounds = f"{100 * found.top1_low:.1f} to {100 * found.top1_high:.1f}"
        change = f"{in_points(found.top1 - 1, found.top1_low - 1, found.top1_high - 1)} points"
        yield _share_row(section, "same first token", 1, found.top1, interval=bounds, change=change, wanted="same")
        bounds = f"{found.kl_low:.2g} to {found.kl_high:.2g}"
        change = f"{found.kl:+.3g} ({found.kl_low:+.3g} to {found.kl_high:+.3g}) nats"
        yield TableRow(section, "KL per token, nats", "0", f"{found.kl:.3g}", bounds, change, "same")


def _similarity_rows(changes: Mapping[str, ScoreChange]) -> Iterator[TableRow]:
    for key, words in _SIMILARITY_NAMES.items():
        if key in changes:
            change = changes[key]
            sides = f"{change.before.value:.3f}", f"{change.after.value:.3f}"
            bounds = f"{change.after.low:.3f} to {change.after.high:.3f}"
            difference = f"{change.difference:+.3f} ({change.low:+.3f} to {change.high:+.3f})"
            yield TableRow("similarity to the right answer", words, *sides, bounds, difference, "same")


def _harness_rows(comparison: Comparison) -> Iterator[TableRow]:
    """The tasks by the names that were asked for, or, where such a name is a tag, all that were run."""
    base, unlearned = comparison.base.lm_eval, comparison.unlearned.lm_eval
    if base is None or unlearned is None:
        return
    tasks = dict.fromkeys(name for name in unlearned.asked if name in unlearned.tasks)
    if len(tasks) < len(unlearned.asked):
        tasks = dict.fromkeys(unlearned.tasks)
    for task in tasks:
        metric = main_metric(unlearned.tasks[task])
        before = base.tasks[task].metrics.get(metric) if task in base.tasks and metric is not None else None
        if metric is not None and before is not None:
            after = unlearned.tasks[task].metrics[metric]
            paired = comparison.lm_eval.get(task)
            change = "" if paired is None else f" ({paired.low:+.3f} to {paired.high:+.3f})"
            bounds, change = _harness_interval(unlearned.tasks[task], metric, after), f"{after - before:+.3f}{change}"
            yield TableRow("lm-eval", f"{task}, {metric}", f"{before:.3f}", f"{after:.3f}", bounds, change, "same")


def _harness_interval(scores: TaskScores, metric: str, value: float) -> str:
    """Two standard errors of the harness either way; empty where it gives none."""
    name, _, chosen = metric.partition(",")
    error = scores.metrics.get(f"{name}_stderr" + (f",{chosen}" if chosen else ""))
    return "" if error is None else f"{value - 1.96 * error:.3f} to {value + 1.96 * error:.3f}"


def on_terminal(rate: str) -> tuple[Measure, ...]:
    """A line each: ``rate`` is the harmful rate that decides."""
    return (
        ("replies", "forget_test", rate, "harmful, unseen prompts", "down"),
        ("prefill", "forget_test", rate, "harmful", "down"),
        ("leak", "forget_test", rate, "harmful, any of {k} sampled replies", "down"),
        ("replies", "forget_test", "gibberish", "gibberish, unseen prompts", "same"),
        ("replies", "retain_test", "over_refusal", "refused, normal prompts", "same"),
        ("replies", BORDERLINE, "over_refusal", "refused, borderline prompts", "same"),
        ("replies", "retain_test", "exact_answer", "exact answers, normal prompts", "same"),
        ("perplexity", "retain_test", "ratio", "perplexity of normal answers, to base", "same"),
    )


@dataclass(frozen=True)
class KeyFigure:
    """One figure before and after, with the 95 % interval of what it is after."""

    split: str
    metric: str
    """Such as ``harmful_replies``."""
    label: str
    wanted: Wanted
    change: Change
    caution: str
    """Why it can't be taken as it stands; empty for most."""

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
    """What was measured of ``ON_PAGE`` or ``ON_CARD``, in that order."""
    unlearned = comparison.unlearned.setup.split_name("forget_train")
    for kind, split, rate, words, wanted in measures:
        tried = list(comparison.unlearned.prefill.get(split, ())) if kind == "prefill" else []
        for k, change, caution in _measured(comparison, kind, split, rate):
            shown, detail = words.format(unlearned=unlearned, k=k, harm=HARM_WORDS[comparison.rate]), ""
            if kind == "prefill":
                shown = f"{shown}, {prefill_words(tried)}"
                detail = start_words(comparison.unlearned.worst_prefill[split]) if len(tried) > 1 else ""
            label = f"{shown} ({detail})" if detail else shown
            yield KeyFigure(split, f"{rate}_{kind}", label, wanted, change, caution)


def _measured(comparison: Comparison, kind: Kind, split: str, rate: str) -> Iterator[tuple[str, Change, str]]:
    """Number of sampled replies as a word, change and caution; nothing where it was not measured."""
    if kind == "leak":
        yield from most_sampled(comparison, split)
    elif kind == "perplexity":
        if split in comparison.perplexity:
            yield "", comparison.perplexity[split], ""
    else:
        change = (comparison.prefill if kind == "prefill" else comparison.by_category).get(split, {}).get(rate)
        if change is not None:
            yield "", change, caution_of(comparison.unlearned.judge, change) if rate in HARM_WORDS else ""
