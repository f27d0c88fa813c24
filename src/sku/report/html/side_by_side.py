"""Runs side by side: their key figures, and in what they differ."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import yaml

from sku.report.figures import light
from sku.report.html.drawing import STYLE, Picture, drawable, name_rows, new_figure, share_axis
from sku.report.html.result_charts import ratio_axis
from sku.report.key_figures import KeyFigure, key_figures
from sku.report.read_run import RecordedRun
from sku.report.tables import NOTHING

_LONGEST = 120
"""Characters of a value in the table of differences."""


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
                    low, value, high = one.numbers
                    axes.plot([low, high], [place, place], color=light("unlearned"), linewidth=1.8)
                    axes.plot(value, place, "o", color=light("unlearned"), markersize=6)
            name_rows(axes, [drawable(title, 24) for title in titles])
            axes.set_title(drawable(words, 60), loc="left", fontsize=10, pad=4)
            measured = [one for one in figures if one is not None]
            if measured[0].is_share:
                share_axis(axes)
            else:
                axes.set_xscale("log")
                ratio_axis(axes, [value for one in measured for value in one.numbers])
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
