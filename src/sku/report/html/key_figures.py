"""The few figures of a run that a reader looks at first, in words and in numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from sku.evaluate.comparison import LeakChange, RateChange
from sku.evaluate.metrics import prefill_words
from sku.report.html.run_folder import Changes, RecordedRun
from sku.report.tables import caution_of, interval, percent

Wanted = Literal["down", "up", "same"]


@dataclass(frozen=True, kw_only=True)
class KeyFigure:
    """One figure before and after, with the 95 % interval of what it is after."""

    name: str
    """For code and for pairing runs."""
    words: str
    wanted: Wanted
    before: str
    after: str
    bounds: str
    value: float
    """After: a share, or a perplexity as a ratio to the base's."""
    low: float
    high: float
    is_share: bool
    caution: str = ""
    """Why it can't be taken as it stands; empty for most."""
    detail: str = ""
    """What differs from run to run: the length of the worst prefill."""


def key_figures(run: RecordedRun) -> list[KeyFigure]:
    """Harm first, then what it cost; what was not measured is left out.

    Args:
        run: A finished run.

    Returns:
        Figures in reading order.
    """
    figures = [
        *_of_rate(run, run.replies, "unseen", "harmful", "harmful, unseen prompts", "down"),
        *_of_prefill(run),
        *_of_leak(run),
        *_of_rate(
            run, run.replies, "unlearned", "harmful", f"harmful, {run.unlearned.setup.split_name('unlearned')}", "down"
        ),
        *_of_rate(run, run.replies, "unseen", "degenerate", "gibberish, unseen prompts", "same"),
        *_of_rate(run, run.replies, "retain_test", "exact_answer", "exact answers, normal prompts", "same"),
        *_of_rate(run, run.replies, "retain_test", "over_refusal", "refused, normal prompts", "same"),
    ]
    if (change := run.perplexity.get("retain_test")) is not None:
        figures.append(
            KeyFigure(
                name="perplexity",
                words="perplexity of normal answers, to the base's",
                wanted="same",
                before="\u00d71",
                after=f"\u00d7{change.ratio:.4g}",
                bounds=f"{change.low:.4g} to {change.high:.4g}",
                value=change.ratio,
                low=change.low,
                high=change.high,
                is_share=False,
            )
        )
    return figures


def _of_rate(
    run: RecordedRun, changes: Changes, split: str, name: str, words: str, wanted: Wanted
) -> Iterator[KeyFigure]:
    change = changes.get(split, {}).get(name)
    if change is not None:
        caution = caution_of(run.unlearned.judge, change) if name == "harmful" else ""
        yield _share(f"reply/{split}/{name}", words, wanted, change, caution)


def _of_prefill(run: RecordedRun) -> Iterator[KeyFigure]:
    change = run.prefill.get("unseen", {}).get("harmful")
    if change is not None:
        tried, tokens = [*map(int, run.unlearned.prefill["unseen"])], run.unlearned.worst_prefill["unseen"]
        words = f"harmful, unseen prompts, {prefill_words(tried)}"
        caution = caution_of(run.unlearned.judge, change)
        figure = _share(f"prefill/unseen/harmful/{tried}", words, "down", change, caution)
        yield dataclasses.replace(
            figure, detail=prefill_words([tokens]).removeprefix("prefill, ") if tried[1:] else ""
        )


def _of_leak(run: RecordedRun) -> Iterator[KeyFigure]:
    leaks = run.leak.get("unseen", {})
    for k in sorted(leaks, key=int)[-1:]:
        if int(k) > 1:
            caution = caution_of(run.unlearned.judge, leaks[k], replies=int(k))
            words = f"harmful, any of {k} drawn replies, unseen prompts"
            yield _share(f"leak/{k}", words, "down", leaks[k], caution)


def _share(name: str, words: str, wanted: Wanted, change: RateChange | LeakChange, caution: str) -> KeyFigure:
    after = change.after
    return KeyFigure(
        name=name,
        words=words,
        wanted=wanted,
        before=percent(change.before.value),
        after=percent(after.value),
        bounds=interval(after),
        value=after.value,
        low=after.low,
        high=after.high,
        is_share=True,
        caution=caution,
    )
