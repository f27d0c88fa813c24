"""How often a judge is right: its verdicts against people's labels.

A labelled set is a table of prompts, replies and labels. The judge is asked as it is, without the gate that an
evaluation puts before it, so its own errors are measured. What is measured on one kind of text does not carry over to
another: label a hundred replies of the run at hand too.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from statsmodels.stats.inter_rater import cohens_kappa

from sku.config import SourceConfig
from sku.data.rows import Row, listed, parse_flag, plain_name, require
from sku.data.tables import read_table
from sku.errors import DataError, EvaluationError
from sku.evaluate.judges import Calibration, Judge, label_of, verdicts_of
from sku.evaluate.judges.precomputed import text_of_cell
from sku.evaluate.metrics import Rate, rate
from sku.evaluate.records import GenerationRecord
from sku.evaluate.statistics import Estimate, auc, auc_interval

SAFE_COLUMNS = ("is_safe", "safe")
"""Label columns in which ``true`` and 1 mean safe; in all others they mean harmful."""
USUAL_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question"),
    "reply": ("reply", "response", "answer", "completion"),
    "label": ("label", "human_score", "is_harmful", "harmful", "is_unsafe", "unsafe", *SAFE_COLUMNS),
}
LICENCE_COLUMNS = ("licence", "license")
LABEL_WORDS = {"harmful": True, "unsafe": True, "safe": False, "harmless": False, "refusal": False}
"""Label -> whether it is harmful."""


@dataclass(frozen=True, kw_only=True)
class LabelColumns:
    """What the columns of a labelled set mean."""

    named: Mapping[str, str] = field(default_factory=dict)
    """``prompt``, ``reply`` or ``label`` -> its column; the others are recognised by their names."""
    harmful_value: str | None = None
    """What the label column holds on harmful replies, in any case; all other values are then safe."""
    every: bool | None = None
    """Whether every reply is harmful, or none is, in a set that has no labels."""
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Column -> values; rows with another value are left out."""


@dataclass(frozen=True, kw_only=True)
class LabelledReply:
    """A reply, and what a person says of it."""

    prompt: str
    reply: str
    harmful: bool
    prefill: str = ""


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """Replies with labels, and what was left out."""

    name: str
    replies: tuple[LabelledReply, ...]
    left_out: Mapping[str, int]
    """Reason -> rows."""
    licences: frozenset[str] = frozenset()
    """Those that the rows state."""

    @property
    def sha256(self) -> str:
        """Hash over prompts, replies, labels and prefills, in order."""
        rows = [[one.prompt, one.reply, one.harmful, *([one.prefill] if one.prefill else [])] for one in self.replies]
        return hashlib.sha256("".join(json.dumps(row) + "\n" for row in rows).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A judge on labelled replies."""

    sensitivity: Rate | None
    """Share of the harmful replies that the judge calls harmful; None where there are none."""
    specificity: Rate | None
    """Share of the safe replies that it lets pass; None where there are none."""
    accuracy: Rate
    auc: Estimate | None
    """Area under the ROC curve of its probabilities, its 95 % interval a bootstrap over prompts; None where it gives
    none, or one kind of reply is missing."""


@dataclass(frozen=True, kw_only=True)
class CalibrationReport:
    """What was measured on a judge."""

    judge: str
    figures: Figures
    calibration: Calibration | None
    """None on replies of one kind alone, from which no rate can be corrected."""
    kappa: float | None
    """Cohen's kappa of judge and labels; None where it has no value, as the judge says the same of all replies."""
    left_out: Mapping[str, int]
    """Reason -> rows that were not asked, or got no verdict."""


Called = tuple[LabelledReply, bool, float | None]
"""A reply, whether a judge calls it harmful, and its probability of that; None for a judge without any."""


def figures_of(rows: Sequence[Called], *, seed: int = 0) -> Figures:
    """What a judge says of labelled replies, at least one.

    Args:
        rows: Replies with what the judge calls them.
        seed: Of the bootstrap.
    """
    found = [hit for entry, hit, _ in rows if entry.harmful]
    passed = [not hit for entry, hit, _ in rows if not entry.harmful]
    scores = [score for _, _, score in rows if score is not None]
    area = None
    if found and passed and len(scores) == len(rows):
        truths = [entry.harmful for entry, _, _ in rows]
        low, high = auc_interval(scores, truths, clusters=[entry.prompt for entry, _, _ in rows], seed=seed)
        area = Estimate(value=auc(scores, truths), low=low, high=high)
    accuracy = rate(hit == entry.harmful for entry, hit, _ in rows)
    assert accuracy is not None
    return Figures(sensitivity=rate(found), specificity=rate(passed), accuracy=accuracy, auc=area)


def read_labelled(
    path: str, columns: LabelColumns | None = None, *, limit: int | None = None, seed: int = 0
) -> LabelledSet:
    """Reads a labelled set.

    Args:
        path: Anything that ``read_table`` reads: CSV, JSON Lines, Parquet, a folder, a hub id.
        columns: Their names, where they are not the usual ones.
        limit: Keep this many labelled replies, drawn by the seed; all if None.
        seed: Of that draw.

    Returns:
        Replies in order of the file. Rows without label, prompt or reply are counted in ``left_out``. Of a file that
        ``sku judge export`` made, prefills are read too and guards against formulas taken away.

    Raises:
        DataError: The file can't be read, a column is missing or in doubt, or a label can't be understood.
    """
    columns = columns or LabelColumns()
    table = read_table(SourceConfig(path=path, where=columns.where))
    wanted = ("prompt", "reply") if columns.every is not None else ("label", "prompt", "reply")
    column_of = {what: _column(what, columns.named.get(what), table.columns) for what in wanted}
    licence = next((name for name in LICENCE_COLUMNS if name in table.columns), None)
    licences: set[str] = set()
    left_out: Counter[str] = Counter(table.left_out)
    replies: list[LabelledReply] = []
    for number, row in enumerate(table.rows, start=1):
        missing = next((what for what, column in column_of.items() if _is_missing(what, row[column])), None)
        if missing is not None:
            left_out[f"no {missing}"] += 1
            continue
        harmful = columns.every
        if harmful is None:
            label = column_of["label"]
            harmful = _is_harmful(row[label], label, columns.harmful_value, f"{path} row {number}")
        cells = [_text(row, column) for column in (column_of["prompt"], "prefill", column_of["reply"])]
        prompt, prefill, reply = map(text_of_cell, cells) if "reply_sha256" in table.columns else cells
        replies.append(LabelledReply(prompt=prompt, prefill=prefill, reply=reply, harmful=harmful))
        licences |= {_text(row, licence)} - {""}
    if limit is not None and limit < len(replies):
        left_out[f"not among the {limit} drawn"] = len(replies) - limit
        replies = [replies[index] for index in sorted(random.Random(seed).sample(range(len(replies)), limit))]
    name = path.rstrip("/").rpartition("/")[2]
    return LabelledSet(name=name, replies=tuple(replies), left_out=dict(left_out), licences=frozenset(licences))


def calibrate(judge: Judge, labelled: LabelledSet, *, one_kind: bool = False) -> CalibrationReport:
    """Asks a judge about labelled replies, each called what the rate that decides counts it as.

    Args:
        judge: Any judge.
        labelled: From ``read_labelled``.
        one_kind: Whether replies of one kind alone are no mistake.

    Returns:
        Sensitivity, specificity and what follows from them. Replies that the judge failed on count in none of them.

    Raises:
        EvaluationError: No harmful or no safe reply was judged, or the judge's verdicts don't match the replies.
    """
    own_word = judge.card.deciding_rate == "harmful_ungated"
    verdicts = verdicts_of(judge, [_record(number, entry) for number, entry in enumerate(labelled.replies)])
    rows: list[Called] = [
        (entry, (own.label if own_word else label_of(own, entry.reply, judge.card)) == "harmful", own.p_harmful)
        for entry, own in zip(labelled.replies, verdicts, strict=True)
        if own.label != "error"
    ]
    counts = Counter((entry.harmful, hit) for entry, hit, _ in rows)
    harmful, safe = (counts[kind, True] + counts[kind, False] for kind in (True, False))
    if not rows or not (one_kind or (harmful and safe)):
        raise EvaluationError(
            f"{labelled.name}: judge {judge.card.name} gave verdicts on {harmful} harmful and {safe} safe replies "
            f"({len(labelled.replies) - len(rows)} without a verdict): both kinds are needed to tell its errors"
        )
    unjudged = len(labelled.replies) - len(rows)
    calibration = Calibration(
        data=labelled.name, data_sha256=labelled.sha256, unjudged=unjudged, harmful=harmful, safe=safe,
        harmful_found=counts[True, True], safe_found=counts[False, False],
    )  # fmt: skip
    return CalibrationReport(
        judge=judge.card.name,
        figures=figures_of(rows),
        calibration=calibration if harmful and safe else None,
        kappa=harm_kappa((entry.harmful, hit) for entry, hit, _ in rows),
        left_out={**labelled.left_out, "no verdict of the judge": unjudged},
    )


def harm_kappa(pairs: Iterable[tuple[bool, bool]]) -> float | None:
    """Cohen's kappa of two who say of each reply whether it is harmful; None where one says the same of all."""
    counts = Counter(pairs)
    table = [[counts[one, other] for other in (False, True)] for one in (False, True)]
    undefined = not all(map(sum, table)) or not all(map(sum, zip(*table, strict=True)))
    return None if undefined else float(cohens_kappa(table, return_results=False))


def _column(what: str, named: str | None, columns: Mapping[str, str]) -> str:
    if named is not None:
        require(columns, [plain_name(named)], "there is no column")
        return plain_name(named)
    usual = [name for name in USUAL_COLUMNS[what] if name in columns]
    if len(usual) != 1:
        trouble = f"columns {' and '.join(usual)} may all be" if usual else "no column is known to be"
        raise DataError(f"{trouble} the {what}: name it with --column {what}=NAME. Columns found: {listed(columns)}")
    return usual[0]


def _is_missing(what: str, cell: object) -> bool:
    """Whether a cell is empty, or NaN as in Parquet files. An empty reply is a reply, an empty label is none."""
    return cell is None or cell != cell or (what == "label" and not str(cell).strip())


def _text(row: Row, column: str | None) -> str:
    """A cell that may be missing."""
    cell = None if column is None else row.get(column)
    return "" if _is_missing("text", cell) else str(cell)


def _is_harmful(cell: object, column: str, harmful_value: str | None, where: str) -> bool:
    text = str(cell).strip().lower()
    if harmful_value is not None:
        return text == harmful_value.strip().lower()
    if text in LABEL_WORDS:
        return LABEL_WORDS[text]
    flag = parse_flag(cell)
    if flag is None:
        known = f"{str(cell)[:40]!r} in column {column} is neither harmful nor safe"
        raise DataError(f"{where}: {known}: say with --harmful-value what stands for harmful")
    return flag != (column in SAFE_COLUMNS)


def _record(number: int, entry: LabelledReply) -> GenerationRecord:
    return GenerationRecord(
        id=f"labelled-{number}", split="forget_test", kind="prefill" if entry.prefill else "reply", category=None,
        prompt=entry.prompt, reference="", reply=entry.reply, num_tokens=len(entry.reply.split()), finished=True,
        prefill=entry.prefill,
    )  # fmt: skip
