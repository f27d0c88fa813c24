"""A judge that looks verdicts up: labels of people, or of anything that writes a CSV file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sku.config import settings_from_dict
from sku.errors import EvaluationError
from sku.evaluate.judges.base import JudgeCard, Verdict
from sku.evaluate.label_files import HumanLabel, LabelFile, read_labels, reply_hash
from sku.evaluate.records import GenerationRecord
from sku.evaluate.refusal import is_refusal


@dataclass(frozen=True, kw_only=True)
class PrecomputedSettings:
    """Settings of the kind ``precomputed``."""

    path: str
    """CSV file, as ``sku judge export`` makes it."""
    name: str = ""
    """Of the judge; that of the file where this is empty."""
    licence: str = "of whoever labelled"
    known_errors: str = ""
    """What is known of the labels; how many there are, and of how many people, where this is empty."""


class PrecomputedJudge:
    """Gives each reply the label that stands in a file for it; a reply without one gets ``error``."""

    def __init__(self, labels: LabelFile, settings: PrecomputedSettings) -> None:
        """Of labels that were read from ``settings.path``."""
        self.settings = settings
        self._labels: dict[str, dict[str, HumanLabel]] = {}
        for label in labels.labels:
            self._labels.setdefault(label.id, {})[label.reply_sha256] = label
        # People who were asked for harmful or not tell no refusals: rules look for those in what they call safe.
        self._tells_refusals = any(label.label == "refusal" for label in labels.labels)
        self.card = _card(labels, settings)

    def judge(self, records: Sequence[GenerationRecord]) -> list[Verdict]:
        """One verdict per record, in order.

        Raises:
            EvaluationError: The file labels these prompts, but other replies to every one of them.
        """
        verdicts = [self._verdict(record) for record in records]
        known = [record for record in records if record.id in self._labels]
        if known and all(verdict.label == "error" for verdict in verdicts):
            raise EvaluationError(
                f"{self.settings.path} labels {len(known)} of these prompts, but other replies to them: it belongs to "
                "another run. Export the replies of this one with `sku judge export`"
            )
        return verdicts

    def strangers(self, records: Sequence[GenerationRecord]) -> list[str]:
        """Ids that are labelled in the file and are none of these records: labels that went unused."""
        return sorted(set(self._labels) - {record.id for record in records})

    def _verdict(self, record: GenerationRecord) -> Verdict:
        labels = self._labels.get(record.id)
        if labels is None:
            return Verdict(id=record.id, label="error", reason="no label in the file")
        label = labels.get(reply_hash(record))
        if label is None:
            return Verdict(id=record.id, label="error", reason="labelled for another reply")
        found = label.label
        if found == "safe" and not self._tells_refusals and is_refusal(record.reply):
            found = "refusal"
        return Verdict(id=record.id, label=found, p_harmful=label.p_harmful)


def precomputed_judge(content: Mapping[str, Any], name: str) -> PrecomputedJudge:
    """Builds the judge of a judge file.

    Args:
        content: Settings.
        name: Of the file.

    Raises:
        EvaluationError: The CSV file is missing or wrong.
        RecipeError: An unknown, missing or wrong setting.
    """
    settings = settings_from_dict(PrecomputedSettings, content, "evaluate.judge_settings", f"judge {name}")
    return PrecomputedJudge(read_labels(Path(settings.path)), settings)


def _card(labels: LabelFile, settings: PrecomputedSettings) -> JudgeCard:
    people = len({label.annotator for label in labels.labels if label.annotator})
    count = (
        f"{len(labels.labels)} labels{f' of {people} people' if people else ''}, {labels.unlabelled} rows without one"
    )
    return JudgeCard(
        name=settings.name or Path(settings.path).stem,
        version=labels.sha256[:16],
        licence=settings.licence,
        needs=("id", "forced_start", "reply"),
        threshold=None,
        known_errors=settings.known_errors or f"{count}; replies that nobody labelled count as unjudged",
        offline=True,
        deterministic=True,
        labels_refusals=True,
        finds_faults=False,
    )
