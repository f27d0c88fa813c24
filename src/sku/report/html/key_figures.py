"""The few figures of a run that a reader looks at first, and runs side by side by them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import yaml

from sku.evaluate.changes import LeakChange, RateChange
from sku.evaluate.comparison import Comparison
from sku.evaluate.metrics import prefill_words
from sku.report.figures import light
from sku.report.html.drawing import STYLE, Picture, drawable, name_rows, new_figure, share_axis
from sku.report.html.result_charts import ratio_axis
from sku.report.read_run import RecordedRun
from sku.report.tables import NOTHING, caution_of, interval, most_sampled, percent

_LONGEST = 120
"""Characters of a value in the table of differences."""
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


def key_figures(run: Comparison) -> list[KeyFigure]:
    """Harm first, then what it cost; what was not measured is left out.

    Args:
        run: Of a run.

    Returns:
        Figures in reading order.
    """
    trained = run.unlearned.setup.split_name("forget_train")
    figures = [
        *_of_rate(run, "forget_test", "harmful", "harmful, unseen prompts", "down"),
        *_of_prefill(run),
        *_of_leak(run),
        *_of_rate(run, "forget_train", "harmful", f"harmful, {trained}", "down"),
        *_of_rate(run, "forget_test", "gibberish", "gibberish, unseen prompts", "same"),
        *_of_rate(run, "retain_test", "exact_answer", "exact answers, normal prompts", "same"),
        *_of_rate(run, "retain_test", "over_refusal", "refused, normal prompts", "same"),
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


def _of_rate(run: Comparison, split: str, name: str, words: str, wanted: Wanted) -> Iterator[KeyFigure]:
    change = run.replies.get(split, {}).get(name)
    if change is not None:
        caution = caution_of(run.unlearned.judge, change) if name == "harmful" else ""
        yield _share(f"reply/{split}/{name}", words, wanted, change, caution)


def _of_prefill(run: Comparison) -> Iterator[KeyFigure]:
    change = run.prefill.get("forget_test", {}).get("harmful")
    if change is not None:
        tried, tokens = [*map(int, run.unlearned.prefill["forget_test"])], run.unlearned.worst_prefill["forget_test"]
        words = f"harmful, unseen prompts, {prefill_words(tried)}"
        caution = caution_of(run.unlearned.judge, change)
        figure = _share(f"prefill/forget_test/harmful/{tried}", words, "down", change, caution)
        yield dataclasses.replace(
            figure, detail=prefill_words([tokens]).removeprefix("prefill, ") if tried[1:] else ""
        )


def _of_leak(run: Comparison) -> Iterator[KeyFigure]:
    for k, change, caution in most_sampled(run, "forget_test"):
        words = f"harmful, any of {k} sampled replies, unseen prompts"
        yield _share(f"leak/{k}", words, "down", change, caution)


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


def run_titles(runs: Sequence[RecordedRun]) -> list[str]:
    """A name for each run: that of its folder, with the path where two are the same."""
    names = [run.title for run in runs]
    return [name if names.count(name) == 1 else str(run.folder) for name, run in zip(names, runs, strict=True)]


def figure_rows(runs: Sequence[RecordedRun]) -> list[tuple[str, list[KeyFigure | None]]]:
    """Every key figure that one of the runs has, with each run's own or None."""
    found = [{figure.name: figure for figure in key_figures(run.comparison)} for run in runs]
    words = {name: figure.words for figures in found for name, figure in figures.items()}
    return [(words[name], [figures.get(name) for figures in found]) for name in words]


def differences(runs: Sequence[RecordedRun]) -> list[tuple[str, list[str]]]:
    """What differs between the runs: keys of the recipes, then code, hardware, versions, data and judge.

    Args:
        runs: Two or more.

    Returns:
        A dotted key and each run's value, for keys whose values are not all the same.
    """
    described = [dict(_described(run)) for run in runs]
    keys = dict.fromkeys(itertools.chain.from_iterable(described))
    rows = [(key, [one.get(key, NOTHING) for one in described]) for key in keys]
    return [(key, [_cut(value) for value in values]) for key, values in rows if len(set(values)) > 1]


def cautions(runs: Sequence[RecordedRun]) -> list[str]:
    """Sentences on why figures of these runs can't simply be set beside each other."""
    questions: dict[str, list[Any]] = {
        "judges": [run.comparison.unlearned.judge.key for run in runs],
        "data": [[source[4] for source in run.reproduction.data] for run in runs],
        "base models": [run.comparison.base.setup.model.get("fingerprint", "") for run in runs],
        "numbers of prompts": [
            {
                split: rates["harmful"].total
                for split, rates in run.comparison.base.replies.items()
                if "harmful" in rates
            }
            for run in runs
        ],
    }
    return [
        f"the runs have different {what}: their figures don't measure the same"
        for what, answers in questions.items()
        if any(answer != answers[0] for answer in answers)
    ]


def figures_chart(runs: Sequence[RecordedRun], titles: Sequence[str]) -> Picture:
    """Each key figure as a panel, each run as a row with its interval."""
    rows = figure_rows(runs)
    with matplotlib.rc_context(STYLE):
        figure, panels = new_figure(len(rows) * (0.6 + 0.26 * len(runs)), len(rows), width=6.4)
        for axes, (words, figures) in zip(panels, rows, strict=True):
            for place, one in enumerate(figures):
                if one is not None:
                    axes.plot([one.low, one.high], [place, place], color=light("unlearned"), linewidth=1.8)
                    axes.plot(one.value, place, "o", color=light("unlearned"), markersize=6)
            name_rows(axes, [drawable(title, 24) for title in titles])
            axes.set_title(drawable(words, 60), loc="left", fontsize=10, pad=4)
            measured = [one for one in figures if one is not None]
            if measured[0].is_share:
                share_axis(axes)
            else:
                axes.set_xscale("log")
                ratio_axis(axes, [value for one in measured for value in (one.low, one.high)])
    return Picture(
        name="key_figures",
        title="Key figures of the unlearned models",
        caption="Dots are the runs' figures, lines their 95 % intervals, each over the prompts of its own run.",
        figure=figure,
        columns=("figure", *titles),
        rows=tuple((words, *(figure_cell(one) for one in figures)) for words, figures in rows),
    )


def figure_cell(figure: KeyFigure | None) -> str:
    """After, with the interval and what speaks against it, and what differs from run to run; a dash for none."""
    if figure is None:
        return NOTHING
    caution, detail = (
        f"{sign} {text}" if text else "" for sign, text in ((";", figure.caution), (",", figure.detail))
    )
    return f"{figure.after} ({figure.bounds}{caution}){detail}"


def _described(run: RecordedRun) -> Iterator[tuple[str, str]]:
    for key, value in _flat(run.recipe):
        yield f"recipe: {key}", value
    for name, value in run.reproduction.facts:
        if name in ("SKU", "model", "judge", "Python", "hardware"):
            yield name, value
    for name, version in run.reproduction.packages:
        yield f"version: {name}", version
    for source in run.reproduction.data:
        yield f"data: {source[0]}", f"{source[2]}, SHA-256 {source[4]}"


def _flat(plain: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in plain.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _words(value)


def _words(value: Any) -> str:
    """A recipe's value as its file writes it."""
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("\n...\n").strip()
    )


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}\u2026"
