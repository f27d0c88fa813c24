"""The report of a run as one HTML file: everything put into the templates, and written.

Three layers keep what models wrote from running: Jinja escapes every value, replies are data that the page's script
puts into text nodes, and the page's policy allows no script, style or request but its own, by hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sku._version import __version__
from sku.errors import OutputError
from sku.evaluate.comparison import Comparison
from sku.evaluate.judges.precomputed import COLUMNS, reply_hash
from sku.evaluate.metrics import HARM_WORDS, start_words
from sku.evaluate.records import HARMFUL_SPLITS, in_order, is_normal
from sku.report.figures import OUTCOMES, PALETTE, Picture, result_charts
from sku.report.read_run import DATA_COLUMNS, RecordedRun, ReplyPair, Side, fits_schema, read_run
from sku.report.run_charts import (
    attack_chart,
    relearn_chart,
    sweep_chart,
    training_chart,
)
from sku.report.tables import key_figures
from sku.report.words import NOTHING, before_after, left_out_lines, percent
from sku.storage import named_disk_errors, write_private_text

_PACKAGE = "sku.report"
_KIND_WORDS = {"reply": "free reply", "prefill": "prefill", "sample": "sampled"}
_OUTCOME_WORDS = {
    "harmful": "harmful", "unjudged": "not judged", "gibberish": "gibberish", "evasive": "evasive",
    "safe_answer": "safe answer", "refusal": "refusal", "refused": "refused", "answered": "answered",
}  # fmt: skip
"""Outcome -> its word, worst first: the order of sorting by outcome."""
_PREFILL_COLUMNS = (
    "prompts, tokens given", "prompts",
    *(f"{words}: {of}" for words in HARM_WORDS.values() for of in ("base", "unlearned", "change (95 %), points")),
    "gibberish, unlearned",
)  # fmt: skip
"""Of ``_prefill_rows``."""


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
    """The report of one run; equal runs give equal pages.

    Raises:
        EvaluationError: The manifest lacks what the page shows.
    """
    with fits_schema(run.folder):
        pictures = tuple(_pictures(run))
        return Page(html=_html(run, pictures), pictures=pictures)


def _pictures(run: RecordedRun) -> Iterator[Picture]:
    yield from result_charts(run.comparison)
    if run.sweep is not None:
        yield sweep_chart(run.sweep)
    if run.log:
        yield training_chart(run.log)
    if run.attacks is not None:
        yield attack_chart(run.attacks)
        if run.attacks.relearn is not None and run.attacks.relearn.results:
            yield relearn_chart(run.title, run.attacks)


def _html(run: RecordedRun, pictures: Sequence[Picture]) -> str:
    style = "".join(f".sw-{name}{{background:{PALETTE[name]}}}\n" for name in OUTCOMES) + _text("style.css")
    script, seconds = _text("page.js"), run.manifest["seconds"]
    environment = Environment(
        loader=PackageLoader(_PACKAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template("report.html.jinja").render(
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        version=__version__,
        nothing=NOTHING,
        pictures={picture.name: picture for picture in pictures},
        data_columns=DATA_COLUMNS,
        title=f"SKU report: {run.title}",
        run=run,
        comparison=run.comparison,
        figures=key_figures(run.comparison),
        sections={name: list(rows) for name, rows in groupby(run.table, key=lambda row: row.section)},
        prefills=_prefill_rows(run.comparison),
        prefill_columns=_PREFILL_COLUMNS,
        attacks_left_out=[] if run.attacks is None else left_out_lines(run.attacks),
        recipe_yaml=yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True, width=100),
        splits=[(name, f"{count:,}") for name, count in run.manifest["data"]["splits"].items()],
        seconds=[
            (name.replace("_", " "), f"{float(value):.1f}")
            for name, value in (*seconds.items(), ("in all", sum(seconds.values())))
        ],
        replies=None if run.pairs is None else Markup(_replies_json(run)),
        pair_count=len(run.pairs or ()),
    )


def _prefill_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Every prefill: prompts asked, harmful shares and their change, gibberish."""
    return [
        (
            f"{comparison.unlearned.setup.split_name(split)}, {start_words(key)}",
            str(change.after.total),
            *(cell for rate in HARM_WORDS for cell in before_after(changes[rate])),
            percent(changes["gibberish"].after.value),
        )
        for split in HARMFUL_SPLITS
        for key, changes in comparison.prefill_by_key.get(split, {}).items()
        if (change := changes.get("harmful")) is not None
    ]


def _replies_json(run: RecordedRun) -> str:
    """The pairs as JSON that may stand inside an HTML script element: ASCII, without ``<``, ``>`` and ``&``.

    Dataset answers are left out for harmful prompts: they are harmful, and no model wrote them.
    """
    pairs, named = run.pairs or (), run.comparison.unlearned.setup.split_name
    plain = {
        "outcomes": _OUTCOME_WORDS,
        "kinds": _KIND_WORDS,
        "splits": {split: named(split) for split in in_order(pair.base.record.split for pair in pairs)},
        "label_columns": [*COLUMNS, "reply_sha256"],
        "rows": [_row(pair) for pair in pairs],
    }
    text = json.dumps(plain, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _row(pair: ReplyPair) -> dict[str, Any]:
    record = pair.base.record
    judged = not is_normal(record.split)
    return {
        "id": record.id,
        "split": record.split,
        "kind": record.kind,
        "sample": record.sample,
        "category": record.category,
        "prompt": record.prompt,
        "start": record.prefill,
        "right": record.reference if is_normal(record.split) else "",
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
