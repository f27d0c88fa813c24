"""The report of a run as one HTML file: everything put into the templates, and written.

Three layers keep what models wrote from running: Jinja escapes every value, replies are data that the page's script
puts into text nodes, and the page's policy allows no script, style or request but its own, by hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sku._version import __version__
from sku.errors import OutputError
from sku.evaluate.comparison import Comparison
from sku.evaluate.judges.precomputed import COLUMNS, reply_hash
from sku.evaluate.records import NORMAL_SPLITS, in_order
from sku.report.figures import PALETTE, Picture
from sku.report.read_run import DATA_COLUMNS, RecordedRun, ReplyPair, Side, read_run
from sku.report.result_charts import OUTCOMES, PREFILL_COLUMNS, prefill_rows, result_charts
from sku.report.run_charts import (
    attack_chart,
    relearn_chart,
    sweep_chart,
    training_chart,
    vector_chart,
)
from sku.report.tables import key_figures
from sku.report.words import TableRow, left_out_lines
from sku.storage import named_disk_errors, write_private_text

_PACKAGE = "sku.report"
_KIND_WORDS = {"reply": "free reply", "prefill": "prefill", "sample": "sampled"}
_OUTCOME_WORDS = {
    "harmful": "harmful", "unjudged": "not judged", "gibberish": "gibberish", "evasive": "evasive",
    "safe_answer": "safe answer", "refusal": "refusal", "refused": "refused", "answered": "answered",
}  # fmt: skip
"""Outcome -> its word, worst first: the order of sorting by outcome."""


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
    verdict: str


def write_report(folder: Path, out: Path, *, plots: Path | None = None, replies: bool = True) -> WrittenReport:
    """Writes the report of a run.

    Args:
        folder: Of a finished run.
        out: ``.html``; what is there is replaced. Readable by its owner alone, since replies of a base model are
            harmful text.
        plots: Folder for every picture as ``.png`` and ``.svg``, made where it is missing.
        replies: Whether the replies of the models go into it.

    Raises:
        EvaluationError: The folder is none of a finished run, or a file in it is broken.
        OutputError: Another suffix, or something can't be written.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"the report {out} must end in .html")
    run = read_run(folder, replies=replies)
    if not out.parent.is_dir():
        raise OutputError(f"{out} can't be written: there is no folder {out.parent}")
    if plots is not None:
        with named_disk_errors(plots):
            plots.mkdir(parents=True, exist_ok=True)
    page = run_page(run)
    drawn = [] if plots is None else [path for picture in page.pictures for path in picture.save(plots)]
    write_private_text(out, page.html)
    return WrittenReport(path=out, plots=tuple(drawn), verdict=run.comparison.verdict.line)


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
        pictures.append(attack_chart(run.attacks))
        if run.attacks.relearn is not None and run.attacks.relearn.results:
            pictures.append(relearn_chart(run.title, run.attacks))
    sections: dict[str, list[TableRow]] = {}
    for row in run.table:
        sections.setdefault(row.section, []).append(row)
    style = "".join(f".sw-{name}{{background:{PALETTE[name]}}}\n" for name in OUTCOMES) + _text("style.css")
    script = _text("page.js")
    environment = Environment(
        loader=PackageLoader(_PACKAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    html = environment.get_template("report.html.jinja").render(
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        version=__version__,
        pictures={picture.name: picture for picture in pictures},
        data_columns=DATA_COLUMNS,
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


def _text(name: str) -> str:
    """A style sheet or script of the package, which must end where its element ends."""
    text = (resources.files(_PACKAGE) / "templates" / name).read_text(encoding="utf-8")
    assert "</" not in text
    assert "<!--" not in text
    return text


def _hash(text: str) -> str:
    """As a content security policy names an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
