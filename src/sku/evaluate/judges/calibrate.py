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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

from statsmodels.stats.inter_rater import cohens_kappa

from sku.config import SourceConfig
from sku.data.rows import Row, parse_flag
from sku.data.tables import read_table
from sku.errors import DataError, EvaluationError, did_you_mean
from sku.evaluate.judges.base import Calibration, Judge
from sku.evaluate.label_files import without_guards
from sku.evaluate.metrics import Rate, rate
from sku.evaluate.records import GenerationRecord

PROMPT_COLUMNS = ("prompt", "question")
REPLY_COLUMNS = ("reply", "response", "answer", "completion")
SAFE_COLUMNS = ("is_safe", "safe")
"""Label columns in which ``true`` and 1 mean safe; in all others they mean harmful."""
LABEL_COLUMNS = ("label", "human_score", "is_harmful", "harmful", "is_unsafe", "unsafe", *SAFE_COLUMNS)
START_COLUMN = "forced_start"
"""What a reply was made to begin with, as ``sku judge export`` writes it."""
LABEL_WORDS = {"harmful": True, "unsafe": True, "safe": False, "harmless": False, "refusal": False}
"""Label -> whether it is harmful."""


@dataclass(frozen=True, kw_only=True)
class LabelColumns:
    """What the columns of a labelled set mean; what is left empty is recognised by its name."""

    prompt: str | None = None
    reply: str | None = None
    label: str | None = None
    harmful_value: str | None = None
    """What the label column holds on harmful replies, in any case; all other values are then safe."""


@dataclass(frozen=True, kw_only=True)
class LabelledReply:
    """A reply, and what a person says of it."""

    prompt: str
    reply: str
    harmful: bool
    forced_start: str = ""


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """Replies with labels, and what was left out."""

    name: str
    replies: tuple[LabelledReply, ...]
    left_out: Mapping[str, int]
    """Reason -> rows."""

    @property
    def sha256(self) -> str:
        """Hash over prompts, replies, labels and forced starts, in order."""
        rows = (
            [entry.prompt, entry.reply, entry.harmful, *([entry.forced_start] if entry.forced_start else [])]
            for entry in self.replies
        )
        lines = (json.dumps(row) + "\n" for row in rows)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class CalibrationReport:
    """What was measured on a judge."""

    judge: str
    calibration: Calibration
    sensitivity: Rate
    specificity: Rate
    accuracy: Rate
    floor: Rate
    """Share of the safe replies that the judge calls harmful: ``1 - specificity``."""
    kappa: float | None
    """Cohen's kappa of judge and labels; None where it has no value, as the judge says the same of all replies."""
    left_out: Mapping[str, int]
    """Reason -> rows that were not asked."""


def read_labelled(
    path: str, columns: LabelColumns | None = None, *, limit: int | None = None, seed: int = 0
) -> LabelledSet:
    """Reads a labelled set.

    Args:
        path: Anything that ``sku.data.tables.read_table`` reads: CSV, JSON Lines, Parquet, a folder, a hub id.
        columns: Their names, where they are not the usual ones.
        limit: Keep this many labelled replies, drawn by the seed; all if None.
        seed: Of that draw.

    Returns:
        Replies in order of the file. Rows without label, prompt or reply are counted in ``left_out``. Of a file that
        ``sku judge export`` made, forced starts are read too and guards against formulas taken away.

    Raises:
        DataError: The file can't be read, a column is missing or in doubt, or a label can't be understood.
    """
    columns = columns or LabelColumns()
    table = read_table(SourceConfig(path=path))
    prompt = _column("prompt", columns.prompt, PROMPT_COLUMNS, table.columns)
    reply = _column("reply", columns.reply, REPLY_COLUMNS, table.columns)
    label = _column("label", columns.label, LABEL_COLUMNS, table.columns)
    left_out: Counter[str] = Counter()
    replies: list[LabelledReply] = []
    for number, row in enumerate(table.rows, start=1):
        missing = _missing(row, {"label": label, "prompt": prompt, "reply": reply})
        if missing is not None:
            left_out[f"no {missing}"] += 1
            continue
        harmful = _is_harmful(row[label], label, columns.harmful_value)
        if harmful is None:
            raise DataError(
                f"{path} row {number}: the label {str(row[label])[:40]!r} in column {label} is neither harmful nor "
                "safe: say with --harmful-value what stands for harmful"
            )
        texts = without_guards(
            str(row[prompt]), _text(row.get(START_COLUMN)), str(row[reply]), _text(row.get("reply_sha256"))
        )
        replies.append(LabelledReply(prompt=texts[0], forced_start=texts[1], reply=texts[2], harmful=harmful))
    if limit is not None and limit < len(replies):
        left_out[f"not among the {limit} drawn"] = len(replies) - limit
        kept = sorted(random.Random(seed).sample(range(len(replies)), limit))
        replies = [replies[index] for index in kept]
    return LabelledSet(name=path.rstrip("/").rpartition("/")[2], replies=tuple(replies), left_out=dict(left_out))


def calibrate(judge: Judge, labelled: LabelledSet) -> CalibrationReport:
    """Asks a judge about labelled replies.

    Args:
        judge: Any judge.
        labelled: From ``read_labelled``.

    Returns:
        Sensitivity, specificity and what follows from them. Replies that the judge failed on count in none of them.

    Raises:
        EvaluationError: No harmful or no safe reply was judged, or the judge's verdicts don't match the replies.
    """
    records = [_record(number, entry) for number, entry in enumerate(labelled.replies)]
    verdicts = judge.judge(records)
    if [verdict.id for verdict in verdicts] != [record.id for record in records]:
        raise EvaluationError(
            f"judge {judge.card.name} gave {len(verdicts)} verdicts for {len(records)} replies, or in another order"
        )
    answered = [
        (entry, verdict) for entry, verdict in zip(labelled.replies, verdicts, strict=True) if verdict.label != "error"
    ]
    judged = [(entry.harmful, verdict.label == "harmful") for entry, verdict in answered]
    words = [len(f"{entry.forced_start} {entry.reply}".split()) for entry, _ in answered]
    unjudged = len(verdicts) - len(judged)
    found, passed = ([called == truth for truth, called in judged if truth == kind] for kind in (True, False))
    sensitivity, specificity, floor = rate(found), rate(passed), rate(not right for right in passed)
    accuracy = rate([*found, *passed])
    if sensitivity is None or specificity is None or floor is None or accuracy is None:
        raise EvaluationError(
            f"{labelled.name}: judge {judge.card.name} gave verdicts on {len(found)} harmful and {len(passed)} safe "
            f"replies ({unjudged} without a verdict): both kinds are needed to tell its errors"
        )
    return CalibrationReport(
        judge=judge.card.name,
        calibration=Calibration(
            data=labelled.name,
            data_sha256=labelled.sha256,
            harmful=sensitivity.total,
            harmful_found=sensitivity.count,
            safe=specificity.total,
            safe_found=specificity.count,
            unjudged=unjudged,
            words_median=median_low(words),
            words_max=max(words),
        ),
        sensitivity=sensitivity,
        specificity=specificity,
        accuracy=accuracy,
        floor=floor,
        kappa=_kappa(judged),
        left_out=labelled.left_out,
    )


def _column(what: str, named: str | None, usual: Sequence[str], columns: Collection[str]) -> str:
    listed = f"Columns found: {', '.join(columns) or 'none'}"
    if named is not None:
        if named not in columns:
            raise DataError(f"there is no column {named}.{did_you_mean(named, columns)} {listed}")
        return named
    found = [name for name in usual if name in columns]
    if len(found) != 1:
        trouble = f"columns {' and '.join(found)} may all be" if found else "no column is known to be"
        raise DataError(f"{trouble} the {what}: name it with --{what}-column. {listed}")
    return found[0]


def _missing(row: Row, columns: Mapping[str, str]) -> str | None:
    """The first thing that a row lacks. An empty reply is a reply, an empty label is none."""
    for what, column in columns.items():
        cell = row[column]
        if _is_nothing(cell) or (what == "label" and not str(cell).strip()):
            return what
    return None


def _is_nothing(cell: object) -> bool:
    return cell is None or cell != cell  # NaN: what Parquet files hold in place of a number that is missing.


def _text(cell: object) -> str:
    """A cell that may be missing."""
    return "" if _is_nothing(cell) else str(cell)


def _is_harmful(cell: object, column: str, harmful_value: str | None) -> bool | None:
    """What a label says; None where it can't be understood."""
    text = str(cell).strip().lower()
    if harmful_value is not None:
        return text == harmful_value.strip().lower()
    if text in LABEL_WORDS:
        return LABEL_WORDS[text]
    flag = parse_flag(cell)
    return None if flag is None else flag != (column in SAFE_COLUMNS)


def _record(number: int, entry: LabelledReply) -> GenerationRecord:
    return GenerationRecord(
        id=f"labelled-{number}",
        split="unseen",
        kind="prefill" if entry.forced_start else "reply",
        category=None,
        prompt=entry.prompt,
        reference="",
        reply=entry.reply,
        num_tokens=len(entry.reply.split()),
        finished=True,
        forced_start=entry.forced_start,
    )


def _kappa(judged: Sequence[tuple[bool, bool]]) -> float | None:
    counts = Counter(judged)
    if len({called for _, called in judged}) < 2:
        return None
    table = [[counts[truth, called] for called in (False, True)] for truth in (False, True)]
    return float(cohens_kappa(table, return_results=False))
