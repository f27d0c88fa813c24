"""Rows of the before/after table about a model's use beside its replies and perplexities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sku.evaluate.comparison import Comparison, ScoreChange
from sku.evaluate.records import in_order
from sku.evaluate.results import BaseAgreement, TaskScores, answers_words
from sku.evaluate.results import main_metric as main_metric
from sku.report.table_rows import TableRow

_SIMILARITY_NAMES = {"rouge_l": "ROUGE-L", "chrf": "chrF", "cosine": "embedding cosine"}


def utility_rows(comparison: Comparison) -> Iterator[TableRow]:
    """BaseAgreement with the base, similarity to the dataset's answers, and the harness's tasks.

    Args:
        comparison: From ``compare``.

    Yields:
        Rows in reading order; what was not measured has none.
    """
    yield from _agreement_rows(comparison.unlearned.agreement)
    yield from _score_rows("similarity to the right answer", comparison.similarity, _SIMILARITY_NAMES)
    yield from _harness_rows(comparison)


def _agreement_rows(agreement: Mapping[str, BaseAgreement]) -> Iterator[TableRow]:
    """The base agrees with itself: divergence 0, the same first token everywhere."""
    whole = "same as base"
    for split in in_order(agreement):
        found, section = agreement[split], f"{whole}, {answers_words(split)}"
        yield TableRow(
            section=section,
            measure="same first token",
            before="100.0 %",
            after=f"{100 * found.top1:.1f} %",
            interval=f"{100 * found.top1_low:.1f} to {100 * found.top1_high:.1f}",
            change=f"{100 * (found.top1 - 1):+.1f} ({100 * (found.top1_low - 1):+.1f} to "
            f"{100 * (found.top1_high - 1):+.1f}) points",
            wanted="same",
        )
        yield TableRow(
            section=section,
            measure="KL per token, nats",
            before="0",
            after=f"{found.kl:.3g}",
            interval=f"{found.kl_low:.2g} to {found.kl_high:.2g}",
            change=f"{found.kl:+.3g} ({found.kl_low:+.3g} to {found.kl_high:+.3g}) nats",
            wanted="same",
        )


def _score_rows(section: str, changes: Mapping[str, ScoreChange], names: Mapping[str, str]) -> Iterator[TableRow]:
    for key, words in names.items():
        if key in changes:
            change = changes[key]
            yield TableRow(
                section=section,
                measure=words,
                before=f"{change.before.value:.3f}",
                after=f"{change.after.value:.3f}",
                interval=f"{change.after.low:.3f} to {change.after.high:.3f}",
                change=f"{change.difference:+.3f} ({change.low:+.3f} to {change.high:+.3f})",
                wanted="same",
            )


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
            bounds = "" if paired is None else f" ({paired.low:+.3f} to {paired.high:+.3f})"
            yield TableRow(
                section="lm-eval",
                measure=f"{task}, {metric}",
                before=f"{before:.3f}",
                after=f"{after:.3f}",
                interval=_harness_interval(unlearned.tasks[task], metric, after),
                change=f"{after - before:+.3f}{bounds}",
                wanted="same",
            )


def _harness_interval(scores: TaskScores, metric: str, value: float) -> str:
    """Two standard errors of the harness either way; empty where it gives none."""
    name, _, chosen = metric.partition(",")
    error = scores.metrics.get(f"{name}_stderr" + (f",{chosen}" if chosen else ""))
    return "" if error is None else f"{value - 1.96 * error:.3f} to {value + 1.96 * error:.3f}"
