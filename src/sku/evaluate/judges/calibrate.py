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
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low

from statsmodels.stats.inter_rater import cohens_kappa

from sku.config import SourceConfig
from sku.data.sources.rows import Row, parse_flag
from sku.data.sources.tables import read_table
from sku.errors import DataError, EvaluationError, did_you_mean
from sku.evaluate.judges import Calibration, Judge, label_of, verdicts_of
from sku.evaluate.judges.precomputed import without_guards
from sku.evaluate.metrics import Rate, rate
from sku.evaluate.records import GenerationRecord, grouped
from sku.evaluate.statistics import auc, auc_interval

PROMPT_COLUMNS = ("prompt", "question")
REPLY_COLUMNS = ("reply", "response", "answer", "completion")
SAFE_COLUMNS = ("is_safe", "safe")
"""Label columns in which ``true`` and 1 mean safe; in all others they mean harmful."""
LABEL_COLUMNS = ("label", "human_score", "is_harmful", "harmful", "is_unsafe", "unsafe", *SAFE_COLUMNS)
START_COLUMN = "prefill"
"""What a reply was made to begin with, as ``sku judge export`` writes it."""
LICENCE_COLUMNS = ("licence", "license")
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
    every: bool | None = None
    """Whether every reply is harmful, or none is, in a set that has no labels."""
    group: str | None = None
    """By which figures are told apart, such as ``source`` or ``response_model``."""
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Column -> values; rows with another value are left out."""


@dataclass(frozen=True, kw_only=True)
class LabelledReply:
    """A reply, and what a person says of it."""

    prompt: str
    reply: str
    harmful: bool
    prefill: str = ""
    group: str = ""
    """What the column ``LabelColumns.group`` holds."""


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
        rows = (
            [entry.prompt, entry.reply, entry.harmful, *([entry.prefill] if entry.prefill else [])]
            for entry in self.replies
        )
        lines = (json.dumps(row) + "\n" for row in rows)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class GroupFigures:
    """A judge on one part of a labelled set."""

    group: str
    """What the replies have in common; ``all`` for all of them."""
    harmful: int
    safe: int
    sensitivity: Rate | None
    """Share of the harmful replies that the judge calls harmful; None where there are none."""
    specificity: Rate | None
    """Share of the safe replies that it lets pass; None where there are none."""
    auc: float | None
    """Area under the ROC curve of its probabilities; None where it gives none, or one kind of reply is missing."""
    auc_low: float | None
    auc_high: float | None
    """95 % interval of it, a bootstrap over prompts."""


ALL = "all"
Called = tuple[LabelledReply, bool, float | None]
"""A reply, whether a judge calls it harmful, and its probability of that; None for a judge without any."""


def figures_of(rows: Sequence[Called], *, seed: int = 0) -> tuple[GroupFigures, ...]:
    """What a judge says of labelled replies.

    Args:
        rows: At least one.
        seed: Of the bootstrap.

    Returns:
        Of all replies, then of each group by name; of all alone where no reply has a group.
    """
    with_area = all(score is not None for _, _, score in rows)
    return tuple(_group(name, part, seed, with_area=with_area) for name, part in _parts(rows))


def _parts(rows: Sequence[Called]) -> list[tuple[str, Sequence[Called]]]:
    """All rows, then those of each group."""
    groups = grouped((row for row in rows if row[0].group), lambda row: row[0].group)
    return [(ALL, rows), *sorted(groups.items())]


def _group(name: str, rows: Sequence[Called], seed: int, *, with_area: bool) -> GroupFigures:
    found = [hit for entry, hit, _ in rows if entry.harmful]
    passed = [not hit for entry, hit, _ in rows if not entry.harmful]
    area = low = high = None
    if found and passed and with_area:
        scores, truths = [score or 0.0 for _, _, score in rows], [entry.harmful for entry, _, _ in rows]
        area = auc(scores, truths)
        low, high = auc_interval(scores, truths, clusters=[entry.prompt for entry, _, _ in rows], seed=seed)
    return GroupFigures(
        group=name,
        harmful=len(found),
        safe=len(passed),
        sensitivity=rate(found),
        specificity=rate(passed),
        auc=area,
        auc_low=low,
        auc_high=high,
    )


@dataclass(frozen=True, kw_only=True)
class CalibrationReport:
    """What was measured on a judge."""

    judge: str
    groups: tuple[GroupFigures, ...]
    """Of all replies, and of each group where the set has groups."""
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
        path: Anything that ``sku.data.sources.tables.read_table`` reads: CSV, JSON Lines, Parquet, a folder, a hub id.
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
    prompt = _column("prompt", columns.prompt, PROMPT_COLUMNS, table.columns)
    reply = _column("reply", columns.reply, REPLY_COLUMNS, table.columns)
    label = None if columns.every is not None else _column("label", columns.label, LABEL_COLUMNS, table.columns)
    if columns.group is not None and columns.group not in table.columns:
        raise _no_column(columns.group, table.columns)
    licence = next((name for name in LICENCE_COLUMNS if name in table.columns), None)
    licences: set[str] = set()
    left_out: Counter[str] = Counter(table.left_out)
    replies: list[LabelledReply] = []
    for number, row in enumerate(table.rows, start=1):
        missing = _missing(row, {**({} if label is None else {"label": label}), "prompt": prompt, "reply": reply})
        if missing is not None:
            left_out[f"no {missing}"] += 1
            continue
        written = "" if label is None else row[label]
        harmful = columns.every if label is None else _is_harmful(written, label, columns.harmful_value)
        if harmful is None:
            raise DataError(
                f"{path} row {number}: the label {str(written)[:40]!r} in column {label} is neither harmful nor safe: "
                "say with --harmful-value what stands for harmful"
            )
        texts = without_guards(
            str(row[prompt]), _text(row.get(START_COLUMN)), str(row[reply]), _text(row.get("reply_sha256"))
        )
        group = "" if columns.group is None else _text(row[columns.group]) or "(none)"
        replies.append(LabelledReply(prompt=texts[0], prefill=texts[1], reply=texts[2], harmful=harmful, group=group))
        if licence is not None and _text(row[licence]):
            licences.add(_text(row[licence]))
    if limit is not None and limit < len(replies):
        left_out[f"not among the {limit} drawn"] = len(replies) - limit
        kept = sorted(random.Random(seed).sample(range(len(replies)), limit))
        replies = [replies[index] for index in kept]
    return LabelledSet(
        name=path.rstrip("/").rpartition("/")[2],
        replies=tuple(replies),
        left_out=dict(left_out),
        licences=frozenset(licences),
    )


def measure_groups(judge: Judge, labelled: LabelledSet) -> tuple[GroupFigures, ...]:
    """What a judge says of labelled replies of one kind alone, from which no rate can be corrected.

    Args:
        judge: Any judge.
        labelled: From ``read_labelled``, at least one reply.

    Raises:
        EvaluationError: The judge gave no verdict, or its verdicts don't match the replies.
    """
    answered = _asked(judge, labelled)
    if not answered:
        raise EvaluationError(f"{labelled.name}: judge {judge.card.name} gave no verdict on any of its replies")
    return figures_of(answered)


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
    answered = _asked(judge, labelled)
    groups = figures_of(answered)
    whole = groups[0]
    floor = rate(hit for entry, hit, _ in answered if not entry.harmful)
    accuracy = rate(hit == entry.harmful for entry, hit, _ in answered)
    if whole.sensitivity is None or whole.specificity is None or floor is None or accuracy is None:
        raise EvaluationError(
            f"{labelled.name}: judge {judge.card.name} gave verdicts on {whole.harmful} harmful and {whole.safe} safe "
            f"replies ({len(labelled.replies) - len(answered)} without a verdict): both kinds are needed to tell its "
            "errors"
        )
    calibration = _counted(labelled, answered)
    return CalibrationReport(
        judge=judge.card.name,
        groups=groups,
        calibration=calibration,
        sensitivity=whole.sensitivity,
        specificity=whole.specificity,
        accuracy=accuracy,
        floor=floor,
        kappa=harm_kappa((entry.harmful, hit) for entry, hit, _ in answered),
        left_out=labelled.left_out,
    )


def _counted(labelled: LabelledSet, answered: Sequence[Called]) -> Calibration:
    """Of verdicts on replies of both kinds."""
    right = Counter((entry.harmful, hit == entry.harmful) for entry, hit, _ in answered)
    words = [len(f"{entry.prefill} {entry.reply}".split()) for entry, _, _ in answered]
    return Calibration(
        data=labelled.name,
        data_sha256=labelled.sha256,
        harmful=right[True, True] + right[True, False],
        harmful_found=right[True, True],
        safe=right[False, True] + right[False, False],
        safe_found=right[False, True],
        unjudged=len(labelled.replies) - len(answered),
        words_median=median_low(words),
        words_max=max(words),
    )


def _asked(judge: Judge, labelled: LabelledSet) -> list[Called]:
    """The replies that the judge gave a verdict on, each called what the rate that decides counts it as."""
    own_word = judge.card.deciding_rate == "harmful_ungated"
    records = [_record(number, entry) for number, entry in enumerate(labelled.replies)]
    verdicts = verdicts_of(judge, records)
    return [
        (
            entry,
            (verdict.label if own_word else label_of(verdict, entry.reply, judge.card)) == "harmful",
            verdict.p_harmful,
        )
        for entry, verdict in zip(labelled.replies, verdicts, strict=True)
        if verdict.label != "error"
    ]


def _column(what: str, named: str | None, usual: Sequence[str], columns: Collection[str]) -> str:
    if named is not None:
        if named not in columns:
            raise _no_column(named, columns)
        return named
    found = [name for name in usual if name in columns]
    if len(found) != 1:
        trouble = f"columns {' and '.join(found)} may all be" if found else "no column is known to be"
        raise DataError(f"{trouble} the {what}: name it with --column {what}=NAME. {_listed(columns)}")
    return found[0]


def _no_column(named: str, columns: Collection[str]) -> DataError:
    return DataError(f"there is no column {named}.{did_you_mean(named, columns)} {_listed(columns)}")


def _listed(columns: Collection[str]) -> str:
    return f"Columns found: {', '.join(columns) or 'none'}"


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
        split="forget_test",
        kind="prefill" if entry.prefill else "reply",
        category=None,
        prompt=entry.prompt,
        reference="",
        reply=entry.reply,
        num_tokens=len(entry.reply.split()),
        finished=True,
        prefill=entry.prefill,
    )


def harm_kappa(pairs: Iterable[tuple[bool, bool]]) -> float | None:
    """Cohen's kappa of two who say of each reply whether it is harmful; None where one says the same of all."""
    counts = Counter(pairs)
    table = [[counts[one, other] for other in (False, True)] for one in (False, True)]
    undefined = not all(map(sum, table)) or not all(map(sum, zip(*table, strict=True)))
    return None if undefined else float(cohens_kappa(table, return_results=False))
