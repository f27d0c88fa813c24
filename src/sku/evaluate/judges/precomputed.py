"""Labels by people: a CSV file of replies to fill in, the same file read back, and the judge that looks them up.

A label belongs to one reply: the file holds a hash of it, so that no label of another run is taken for one of this.
"""

from __future__ import annotations

import csv
import hashlib
import io
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from sku.config import SourceConfig
from sku.data.rows import require
from sku.data.tables import read_table
from sku.errors import EvaluationError, OutputError, did_you_mean
from sku.evaluate.gate import is_refusal
from sku.evaluate.judges import JudgeCard, Label, Verdict
from sku.evaluate.records import GENERATIONS_FILE, GenerationRecord, Split, is_normal, read_generations
from sku.storage import write_private_text

COLUMNS = ("id", "label", "split", "kind")
"""Columns of a file without texts, before ``reply_sha256``."""
TEXT_COLUMNS = ("prompt", "prefill", "reply")
LABELS: Mapping[str, Label] = {
    "harmful": "harmful", "safe": "safe", "refusal": "refusal", "gibberish": "safe", "1": "harmful", "0": "safe",
}  # fmt: skip
"""What may be written in the column ``label``, in any case, and what it means."""

_GUARDED = ("=", "+", "-", "@", "\t", "\r", "\n", "'")
"""A spreadsheet runs cells that begin with one of the first; three may hide one of these, the last is the guard."""


def reply_hash(record: GenerationRecord) -> str:
    """SHA-256 of all that follows the prompt: the prefill and the model's own words."""
    return hashlib.sha256(record.whole_reply.encode("utf-8", "surrogatepass")).hexdigest()


def export_labels(folder: Path, out: Path, *, count: int = 100, split: Split | None = None, seed: int = 0) -> int:
    """Writes a seeded sample of replies to harmful prompts as a CSV file with mode 0600, for people to fill in.

    Args:
        folder: Output folder of ``evaluate``, or one that holds some, such as that of a run: base and unlearned model
            are then mixed, and nothing in the file says which reply is whose.
        out: New file.
        count: Most rows.
        split: Only prompts of this split; all harmful ones if None.
        seed: Equal seeds draw equal rows.

    Returns:
        Rows written.

    Raises:
        EvaluationError: No evaluation in the folder, a broken file, or no reply that fits.
        OutputError: ``out`` exists or can't be written.
    """
    if out.exists():
        raise OutputError(f"{out} already exists and may hold labels; choose another --out or move it away")
    found = [record for path in _generations(folder) for record in read_generations(path)[1]]
    records = {(record.id, reply_hash(record)): record for record in found}
    fitting = sorted(
        key for key, record in records.items()
        if not is_normal(record.split) and split in (None, record.split)
    )  # fmt: skip
    if not fitting:
        raise EvaluationError(f"{folder} holds no reply to a harmful prompt{f' of {split}' if split else ''}")
    drawn = random.Random(seed).sample(fitting, min(count, len(fitting)))
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow([*COLUMNS, *TEXT_COLUMNS, "reply_sha256"])
    for name, digest in drawn:
        record = records[name, digest]
        cells = (safe_cell(getattr(record, key)) for key in TEXT_COLUMNS)
        table.writerow([name, "", record.split, record.kind, *cells, digest])
    # A byte order mark tells spreadsheets that it is UTF-8, which has no room for lone surrogates.
    write_private_text(out, "\ufeff" + text.getvalue().encode("utf-8", "backslashreplace").decode("utf-8"))
    return len(drawn)


def safe_cell(text: str) -> str:
    """Puts a ``'`` before text that a spreadsheet would run as a formula, and before one that begins with it."""
    return f"'{text}" if text.startswith(_GUARDED) else text


def text_of_cell(cell: str) -> str:
    """The text that ``safe_cell`` made this cell of."""
    return cell.removeprefix("'")


def read_labels(path: Path) -> tuple[dict[tuple[str, str], Label], int]:
    """Reads and checks a file of labels.

    Args:
        path: CSV with the columns ``id``, ``label`` and ``reply_sha256``; others are not read. Commas or semicolons.

    Returns:
        Id of a record and hash of its reply -> what the person says, in order; and the rows whose label is empty.

    Raises:
        DataError: The file can't be read, or a column is missing.
        EvaluationError: An unknown label, or a reply labelled twice; with the row.
    """
    table = read_table(SourceConfig(path=str(path)))
    columns = ("id", "label", "reply_sha256")
    require(table.columns, columns, f"{path} has no column", ": make it with `sku judge export`")
    labels: dict[tuple[str, str], Label] = {}
    unlabelled = 0
    for number, row in enumerate(table.rows, start=1):
        where, written = f"{path} row {number}", row["label"].strip().casefold()
        place = row["id"].strip(), row["reply_sha256"].strip()
        if not written:
            unlabelled += 1
        elif place in labels:
            raise EvaluationError(f"{where} labels {place[0]} a second time: one label a reply, one file a person")
        elif written not in LABELS:
            raise EvaluationError(
                f"{where}: label is {written[:40]!r}; it must be harmful (1), safe (0), refusal, gibberish or empty."
                f"{did_you_mean(written, LABELS)}"
            )
        else:
            labels[place] = LABELS[written]
    return labels, unlabelled


def _generations(folder: Path) -> list[Path]:
    patterns = (GENERATIONS_FILE, f"*/{GENERATIONS_FILE}", f"evaluation/*/{GENERATIONS_FILE}")
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    if not found:
        raise EvaluationError(f"{folder} holds no {GENERATIONS_FILE}: give the folder of an evaluation or a run")
    return found


class PrecomputedJudge:
    """Gives each reply the label that stands in a file for it; a reply without one gets ``error``."""

    def __init__(self, path: Path) -> None:
        """Reads the file; errors as of ``read_labels``."""
        self.path, (self._labels, unlabelled) = path, read_labels(path)
        self._ids = {name for name, _ in self._labels}
        # People who were asked for harmful or not tell no refusals: rules look for those in what they call safe.
        self._tells_refusals = "refusal" in self._labels.values()
        decides = sorted((*place, label) for place, label in self._labels.items())
        self.card = JudgeCard(
            name=path.stem,
            version=hashlib.sha256(repr(decides).encode()).hexdigest()[:16],
            licence="of whoever labelled",
            needs=("id", "prefill", "reply"),
            known_errors=(
                f"{len(self._labels)} labels, {unlabelled} rows without one; replies that nobody labelled count as "
                "unjudged"
            ),
            labels_refusals=True,
        )

    def judge(self, records: Sequence[GenerationRecord]) -> list[Verdict]:
        """One verdict per record, in order.

        Raises:
            EvaluationError: The file labels these prompts, but other replies to every one of them.
        """
        verdicts = [self._verdict(record) for record in records]
        known = [record for record in records if record.id in self._ids]
        if known and all(verdict.label == "error" for verdict in verdicts):
            raise EvaluationError(
                f"{self.path} labels {len(known)} of these prompts, but other replies to them: it belongs to "
                "another run. Export the replies of this one with `sku judge export`"
            )
        return verdicts

    def _verdict(self, record: GenerationRecord) -> Verdict:
        label = self._labels.get((record.id, reply_hash(record)))
        if label is None:
            reason = "labelled for another reply" if record.id in self._ids else "no label in the file"
            return Verdict(id=record.id, label="error", reason=reason)
        if label == "safe" and not self._tells_refusals and is_refusal(record.reply):
            label = "refusal"
        return Verdict(id=record.id, label=label)
