"""The report of a run, or of several, as one HTML file: everything put into the templates, and written.

Three layers keep what models wrote from running: Jinja escapes every value, replies are data that the page's script
puts into text nodes, and the page's policy allows no script, style or request but its own, by hash.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sku._version import __version__
from sku.errors import EvaluationError, OutputError, one_line
from sku.evaluate.comparison import Comparison
from sku.evaluate.judges.precomputed import COLUMNS, reply_hash
from sku.evaluate.records import NORMAL_SPLITS, in_order
from sku.report.figures import (
    PAGE_STYLE,
    PALETTE,
    Picture,
    drawable,
    light,
    name_rows,
    new_figure,
    share_axis,
    theme_css,
)
from sku.report.read_run import DATA_COLUMNS, RecordedRun, ReplyPair, Side, read_run
from sku.report.result_charts import PREFILL_COLUMNS, prefill_rows, ratio_axis, result_charts
from sku.report.robustness import left_out_lines
from sku.report.run_charts import (
    attack_chart,
    relearn_chart,
    sweep_chart,
    training_chart,
    vector_chart,
)
from sku.report.tables import KeyFigure, key_figures
from sku.report.words import NOTHING, TableRow
from sku.storage import write_private_text

_PACKAGE = "sku.report"
_KIND_WORDS = {"reply": "free reply", "prefill": "prefill", "sample": "sampled"}
_OUTCOME_WORDS = {
    "harmful": "harmful", "unjudged": "not judged", "gibberish": "gibberish", "evasive": "evasive",
    "safe_answer": "safe answer", "refusal": "refusal", "refused": "refused", "answered": "answered",
}  # fmt: skip
"""Outcome -> its word, worst first: the order of sorting by outcome."""
_LONGEST = 120
"""Characters of a value in the table of differences."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page and the pictures on it."""

    html: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True, kw_only=True)
class WrittenReport:
    """Files of a report, and what it comes to."""

    path: Path
    plots: tuple[Path, ...]
    verdicts: tuple[str, ...]
    """One line a run."""


def write_report(
    folders: Sequence[Path], out: Path, *, plots: Path | None = None, replies: bool = True
) -> WrittenReport:
    """Writes the report of one run, or of several side by side.

    Args:
        folders: Of finished runs; one or more.
        out: ``.html``; what is there is replaced. Readable by its owner alone, since replies of a base model are
            harmful text.
        plots: Folder for every picture as ``.png`` and ``.svg``, made where it is missing.
        replies: Whether the replies of the models go into the report of one run.

    Returns:
        What was written.

    Raises:
        EvaluationError: A folder is none of a finished run, or a file in it is broken.
        OutputError: Another suffix, a folder named twice, or something can't be written.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"the report {out} must end in .html")
    try:
        places = [folder.resolve() for folder in folders]
    except (OSError, RuntimeError) as error:  # Links in a circle; a RuntimeError before Python 3.13.
        raise EvaluationError(f"a run folder can't be read: {one_line(error)}") from None
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise OutputError(f"{folder} is named twice: name each run once")
    several = len(folders) > 1
    runs = [read_run(folder, replies=replies and not several) for folder in folders]
    if not out.parent.is_dir():
        raise OutputError(f"{out} can't be written: there is no folder {out.parent}")
    if plots is not None:
        try:
            plots.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"folder {plots} can't be made: {error.strerror}") from None
    page = comparison_page(runs) if several else run_page(runs[0])
    drawn = [] if plots is None else [path for picture in page.pictures for path in picture.save(plots)]
    write_private_text(out, page.html)
    verdicts = tuple(run.comparison.verdict.line for run in runs)
    return WrittenReport(path=out, plots=tuple(drawn), verdicts=verdicts)


def run_page(run: RecordedRun) -> Page:
    """The report of one run; equal runs give equal pages."""
    pictures = result_charts(run.comparison)
    if run.sweep is not None:
        pictures.append(sweep_chart(run.sweep))
    if run.log:
        pictures.append(training_chart(run.log))
    if run.vector is not None:
        pictures.append(vector_chart(run.vector.layers, run.vector.modules))
    if run.attacks is not None:
        pictures += [attack_chart(run.attacks), *_cost_to_break([(run.title, run)])]
    sections: dict[str, list[TableRow]] = {}
    for row in run.table:
        sections.setdefault(row.section, []).append(row)
    html = _render(
        "run.html.jinja",
        pictures,
        title=f"SKU report: {run.title}",
        run=run,
        comparison=run.comparison,
        figures=key_figures(run.comparison),
        sections=sections,
        prefills=prefill_rows(run.comparison),
        prefill_columns=PREFILL_COLUMNS,
        attacks_left_out=[] if run.attacks is None else left_out_lines(run.attacks),
        replies=None if run.pairs is None else Markup(_replies_json(run.pairs, _names(run.comparison, run.pairs))),
        pair_count=len(run.pairs or ()),
    )
    return Page(html=html, pictures=tuple(pictures))


def _names(comparison: Comparison, pairs: Sequence[ReplyPair]) -> dict[str, str]:
    """Splits that were asked -> what a reader calls them."""
    splits = in_order(pair.base.record.split for pair in pairs)
    return {split: comparison.unlearned.setup.split_name(split) for split in splits}


def _replies_json(pairs: Sequence[ReplyPair], splits: Mapping[str, str]) -> str:
    """The pairs as JSON that may stand inside an HTML script element: ASCII, without ``<``, ``>`` and ``&``.

    Dataset answers are left out for harmful prompts: they are harmful, and no model wrote them.

    Args:
        pairs: Of a run.
        splits: Split -> what a reader calls it.
    """
    plain = {
        "outcomes": _OUTCOME_WORDS,
        "kinds": _KIND_WORDS,
        "splits": dict(splits),
        "label_columns": [*COLUMNS, "reply_sha256"],
        "rows": [_row(pair) for pair in pairs],
    }
    text = json.dumps(plain, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _row(pair: ReplyPair) -> dict[str, Any]:
    record = pair.base.record
    judged = record.split not in NORMAL_SPLITS
    return {
        "id": record.id,
        "split": record.split,
        "kind": record.kind,
        "sample": record.sample,
        "category": record.category,
        "prompt": record.prompt,
        "start": record.prefill,
        "right": record.reference if record.split in NORMAL_SPLITS else "",
        "base": _side(pair.base, judged=judged),
        "unlearned": _side(pair.unlearned, judged=judged),
    }


def _side(side: Side, *, judged: bool) -> Mapping[str, Any]:
    outcome = side.outcome
    return {
        "sha": reply_hash(side.record) if judged else "",
        "text": side.record.reply,
        "outcome": outcome.outcome,
        "hidden": side.hidden,
        "p": outcome.p_harmful,
        "faults": outcome.faults,
        "exact": outcome.exact,
        "cut": not side.record.finished,
    }


def comparison_page(runs: Sequence[RecordedRun]) -> Page:
    """Two or more runs side by side, without their replies; equal runs give equal pages."""
    titles = run_titles(runs)
    pictures = [figures_chart(runs, titles), *_cost_to_break(zip(titles, runs, strict=True))]
    html = _render(
        "comparison.html.jinja",
        pictures,
        title=f"SKU report: {len(runs)} runs",
        runs=list(zip(titles, runs, strict=True)),
        rows=figure_rows(runs),
        differences=differences(runs),
        cautions=cautions(runs),
    )
    return Page(html=html, pictures=tuple(pictures))


def _cost_to_break(runs: Iterable[tuple[str, RecordedRun]]) -> list[Picture]:
    """The picture of relearning, where a run has it."""
    picture = relearn_chart({title: run.attacks for title, run in runs if run.attacks is not None})
    return [] if picture is None else [picture]


def _render(template: str, pictures: Sequence[Picture], **values: object) -> str:
    swatches = "".join(f".sw-{name}{{background:var(--{name})}}\n" for name in PALETTE)
    style = theme_css() + swatches + _text("style.css")
    script = _text("page.js")
    return _environment().get_template(template).render(
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        version=__version__,
        pictures={picture.name: picture for picture in pictures},
        svg={picture.name: Markup(picture.svg()) for picture in pictures},
        data_columns=DATA_COLUMNS,
        **values,
    )  # fmt: skip


@functools.cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader(_PACKAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _text(name: str) -> str:
    """A style sheet or script of the package, which must end where its element ends."""
    text = (resources.files(_PACKAGE) / "templates" / name).read_text(encoding="utf-8")
    assert "</" not in text
    assert "<!--" not in text
    return text


def _hash(text: str) -> str:
    """As a content security policy names an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


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
    with matplotlib.rc_context(PAGE_STYLE):
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
