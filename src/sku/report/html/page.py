"""The page: everything of a run, or of several, put into the templates.

Three layers keep what models wrote from running: Jinja escapes every value, replies are data that the page's script
puts into text nodes, and the page's policy allows no script, style or request but its own, by hash.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sku._version import __version__
from sku.evaluate.records import in_order
from sku.report.attack_table import left_out_lines
from sku.report.html.drawing import Picture
from sku.report.html.key_figures import key_figures
from sku.report.html.palette import PALETTE, theme_css
from sku.report.html.reply_pairs import ReplyPair, replies_json
from sku.report.html.reproduction import DATA_COLUMNS
from sku.report.html.result_charts import attack_chart, prefill_rows, result_charts, sections_of
from sku.report.html.run_charts import precision_chart, training_chart, vector_chart
from sku.report.html.run_folder import RecordedRun
from sku.report.html.several_runs import cautions, differences, figure_rows, figures_chart, run_titles
from sku.report.html.sweep_chart import sweep_chart

_PACKAGE = "sku.report.html"


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page and the pictures on it."""

    html: str
    pictures: tuple[Picture, ...]


def run_page(run: RecordedRun) -> Page:
    """The report of one run.

    Args:
        run: From ``read_run``.

    Returns:
        The page; equal runs give equal pages.
    """
    pictures = result_charts(run)
    if run.sweep is not None:
        pictures.append(sweep_chart(run.sweep))
    if run.log:
        pictures.append(training_chart(run.log))
    if run.vector is not None:
        pictures.append(vector_chart(run.vector))
    if run.precisions is not None:
        pictures.append(precision_chart(run.precisions.rows))
    if run.attacks is not None:
        pictures.append(attack_chart(run.attacks))
    html = _render(
        "run.html.jinja",
        pictures,
        title=f"SKU report: {run.title}",
        run=run,
        figures=key_figures(run),
        sections=list(sections_of(run.table)),
        prefills=prefill_rows(run),
        attacks_left_out=[] if run.attacks is None else left_out_lines(run.attacks),
        replies=None if run.pairs is None else Markup(replies_json(run.pairs, _names(run, run.pairs))),
        pair_count=len(run.pairs or ()),
    )
    return Page(html=html, pictures=tuple(pictures))


def _names(run: RecordedRun, pairs: Sequence[ReplyPair]) -> dict[str, str]:
    """Splits that were asked -> what a reader calls them."""
    splits = in_order(pair.base.record.split for pair in pairs)
    return {split: run.unlearned.setup.split_name(split) for split in splits}


def comparison_page(runs: Sequence[RecordedRun]) -> Page:
    """Several runs side by side, without their replies.

    Args:
        runs: Two or more, from ``read_run``.

    Returns:
        The page; equal runs give equal pages.
    """
    titles = run_titles(runs)
    pictures = [figures_chart(runs, titles)]
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
