"""Replies under attack and the losses on them: written once, and reused where nothing that decides them differs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from peft import PeftModel
from transformers import PreTrainedModel

from sku.attacks.base import Attack, AttackContext, PromptSetting, WeightSetting
from sku.attacks.questions import Group
from sku.config import plain_data
from sku.evaluate import asking, batching
from sku.evaluate.generation import decoding_settings, generate_replies
from sku.evaluate.outcomes import find_faults
from sku.evaluate.perplexity import SHUFFLES, SURE_GAIN, score_fluency
from sku.evaluate.record_files import header_hash, read_if_same, write_rows
from sku.evaluate.records import FluencyRecord, GenerationRecord

SUBJECTS: tuple[Literal["model"], Literal["control"]] = ("model", "control")


@dataclass(frozen=True, kw_only=True)
class AttackReplies:
    """What both models say under attack."""

    context: AttackContext
    base: PreTrainedModel
    """The control, and what scores fluency."""
    writer: asking.Writer
    stop_ids: Sequence[int]
    about: Mapping[str, Mapping[str, str]]
    """Subject -> what tells it from other models."""
    folder: Path | None
    """Where replies and losses are kept; nowhere if None."""

    def replies(self, attack: Attack, groups: Sequence[Group]) -> dict[tuple[str, str], list[GenerationRecord]]:
        """Replies of both models, or those of an earlier run that did the same.

        Args:
            attack: Whose settings ``groups`` holds.
            groups: What is asked.

        Returns:
            Subject and setting -> replies.

        Raises:
            SkuError: A setting can't be trained or quantized, or a file can't be read or written.
        """
        header = {
            "attack": attack.card.name,
            "model": self.about["model"],
            "control": self.about["control"],
            "decoding": self.decoding(),
            "prompt_format": self.writer.prompt_format.name,
            "seed": self.context.recipe.seed,
            "settings": [
                {
                    "name": group.setting.name,
                    "details": plain_data(group.setting.details),
                    "requests": header_hash({"asked": [dataclasses.asdict(ask.request) for ask in group.asks]}),
                }
                for group in groups
            ],
        }
        file = None if self.folder is None else self.folder / f"{attack.card.name}.jsonl"
        rows = None if file is None else read_if_same(file, header, GenerationRecord)
        if rows is None:
            rows = self._write_replies(attack, groups)
            if file is not None:
                write_rows(file, header, rows)
        return {
            (subject, group.setting.name): _without_prefix(rows, _prefix(subject, group.setting.name))
            for subject in SUBJECTS
            for group in groups
        }

    def _write_replies(self, attack: Attack, groups: Sequence[Group]) -> list[GenerationRecord]:
        rows: list[GenerationRecord] = []
        total = len(SUBJECTS) * sum(len(group.asks) for group in groups)
        for subject, model in zip(SUBJECTS, (self.context.model, self.base), strict=True):
            for group in groups:
                with _attacked(group.setting, model) as attacked:
                    found = generate_replies(
                        cast(PreTrainedModel, attacked),
                        self.writer.tokenizer,
                        [ask.request for ask in group.asks],
                        stop_ids=self.stop_ids,
                        max_new_tokens=self.context.recipe.evaluate.max_new_tokens,
                        batch_size=self.context.recipe.evaluate.batch_size,
                        window=self.writer.window,
                        progress=self._report(f"attack {attack.card.name}: replies", len(rows), total),
                    )
                prefix = _prefix(subject, group.setting.name)
                rows += [dataclasses.replace(record, id=prefix + record.id) for record in found]
        return rows

    def fluency(
        self, attack: Attack, replies: Mapping[tuple[str, str], list[GenerationRecord]]
    ) -> dict[tuple[str, str], dict[str, FluencyRecord]]:
        """The base model's losses on the replies that no surface rule has found already.

        Args:
            attack: Of the replies.
            replies: Of ``self.replies``.

        Returns:
            Subject and setting -> record id -> losses.

        Raises:
            SkuError: A file can't be read or written.
        """
        unclear = {
            key: [record for record in records if not find_faults(record, None)] for key, records in replies.items()
        }
        header = {
            "scorer": self.about["control"]["fingerprint"],
            "shuffles": [SHUFFLES, SURE_GAIN],
            "scored": "reply",
            "seed": self.context.recipe.seed,
            "texts": header_hash(
                {
                    _prefix(*key): [(entry.id, entry.prompt, entry.forced_start, entry.reply) for entry in records]
                    for key, records in unclear.items()
                }
            ),
        }
        file = None if self.folder is None else self.folder / f"{attack.card.name}.fluency.jsonl"
        rows = None if file is None else read_if_same(file, header, FluencyRecord)
        if rows is None:
            rows = self._score_fluency(attack, unclear)
            if file is not None:
                write_rows(file, header, rows)
        return {key: {row.id: row for row in _without_prefix(rows, _prefix(*key))} for key in unclear}

    def _score_fluency(
        self, attack: Attack, unclear: Mapping[tuple[str, str], list[GenerationRecord]]
    ) -> list[FluencyRecord]:
        rows: list[FluencyRecord] = []
        for key, records in unclear.items():
            with batching.evaluation_mode(self.base):
                found = score_fluency(
                    self.base,
                    records,
                    self.writer.scored_reply,
                    seed=self.context.recipe.seed,
                    batch_size=self.context.recipe.evaluate.batch_size,
                    progress=self._report(f"attack {attack.card.name}: fluency"),
                )
            rows += [dataclasses.replace(record, id=_prefix(*key) + record.id) for record in found]
        return rows

    def decoding(self) -> dict[str, Any]:
        """How replies are written, as the headers of files name it."""
        return decoding_settings(self.stop_ids, self.context.recipe.evaluate.max_new_tokens)

    def _report(self, stage: str, before: int = 0, total: int | None = None) -> batching.Progress | None:
        progress = self.context.progress
        if progress is None:
            return None
        return lambda done, own: progress(stage, before + done, own if total is None else total)


@contextmanager
def _attacked(setting: PromptSetting | WeightSetting, model: PreTrainedModel) -> Iterator[PreTrainedModel | PeftModel]:
    changed = setting.change(model) if isinstance(setting, WeightSetting) else nullcontext(model)
    with changed as attacked, batching.evaluation_mode(cast(PreTrainedModel, attacked)):
        yield attacked


def _prefix(subject: str, setting: str) -> str:
    """What tells the rows of one subject and setting from the others in a file."""
    return f"{subject}/{setting}/"


def _without_prefix(rows: Sequence[Any], prefix: str) -> list[Any]:
    return [dataclasses.replace(row, id=row.id.removeprefix(prefix)) for row in rows if row.id.startswith(prefix)]
