"""A sequence classifier as judge: one forward pass gives the probability that a reply is harmful.

Three kinds of heads are read: classes of which some are harmful (softmax), independent kinds of harm (sigmoid, as
beaver-dam's fourteen), and a single logit that is positive for harm (sigmoid, as a cost model's).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from sku.config import settings_from_dict
from sku.errors import EvaluationError, RecipeError, did_you_mean
from sku.evaluate.batching import pad, run_in_batches
from sku.evaluate.judges.base import Verdict
from sku.evaluate.judges.conversations import PROMPT, REPLY, ConversationEncoder, Encoded, Unreadable
from sku.evaluate.judges.local_models import (
    LocalModelSettings,
    cut_reason,
    errors_named,
    fields_read,
    judged_text,
    make_card,
    tell_cuts,
)
from sku.evaluate.records import GenerationRecord
from sku.models import LoadedModel, embedding_weight, load_classifier, load_config, load_tokenizer

ANY = "any"
"""Every label of the head is a kind of harm."""


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings(LocalModelSettings):
    """A judge file of kind ``classifier``."""

    max_length: int = 512
    template: str | None = None
    """The text to classify, with ``{reply}`` and, where the model reads it, ``{prompt}``; empty: a pair of texts."""
    harmful: str | tuple[str | int, ...] | None = None
    """Labels (names of the model's ``id2label``, or numbers) that mean harm, or ``any``; a single logit needs none."""
    activation: Literal["auto", "softmax", "sigmoid"] = "auto"
    """``auto``: sigmoid where the model is multi-label or has a single logit, else softmax."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template is not None and "{reply}" not in self.template:
            raise RecipeError("template has no {reply}: the judge would read the same text every time")


class ClassifierJudge:
    """Judges by the probabilities of a sequence classifier."""

    def __init__(self, settings: ClassifierSettings, name: str) -> None:
        """Reads configuration and tokenizer; the weights follow with the first reply.

        Args:
            settings: Of the judge file.
            name: Of the judge file.

        Raises:
            ModelError: The model can't be found or read.
            EvaluationError: ``harmful`` or ``activation`` don't fit the model's head.
        """
        self._settings, self._name = settings, name
        self._loaded: LoadedModel | None = None
        with errors_named(name):
            config, tokenizer = load_config(settings.source), load_tokenizer(settings.source)
            self.card = make_card(
                settings,
                name,
                needs=fields_read(settings, prompt=settings.template is None or "{prompt}" in settings.template),
                threshold=settings.threshold,
                labels_refusals=False,
            )
        self._labels = [str(label) for _, label in sorted((config.id2label or {}).items())]
        self._sigmoid = _is_sigmoid(settings, config)
        self._harmful = _harmful_labels(settings, self._labels, name, sigmoid=self._sigmoid)
        template = settings.template
        self._limit = min(settings.max_length, longest_input(config, tokenizer.model_max_length))
        self._encoder = ConversationEncoder(
            tokenizer,
            None if template is None else template.replace("{prompt}", PROMPT).replace("{reply}", REPLY),
            markers=settings.markers,
            add_special_tokens=True,
            max_length=self._limit,
        )
        self._pad_id = int(tokenizer.pad_token_id)

    def judge(self, records: Sequence[GenerationRecord]) -> list[Verdict]:
        """One verdict per record: harmful from the threshold on; too long replies are read as far as they fit."""
        read = [self._encoder.encode(record.prompt, judged_text(record, self._settings)) for record in records]
        rows = [row for row in read if isinstance(row, Encoded)]
        scores = iter(self._scores(rows))
        verdicts = [
            Verdict(id=record.id, label="error", reason=row.reason)
            if isinstance(row, Unreadable)
            else self._verdict(record.id, next(scores), cut_reason([row]))
            for record, row in zip(records, read, strict=True)
        ]
        tell_cuts(verdicts, self.card.name, self._limit)
        return verdicts

    def _scores(self, rows: Sequence[Encoded]) -> list[list[float] | None]:
        """Probabilities of all labels per row; None where memory ran out on it."""
        scores: list[list[float] | None] = [None] * len(rows)
        if not rows:
            return scores
        model = self._model()

        def classify(batch: list[int]) -> None:
            try:
                found = self._probabilities(model, [rows[index] for index in batch])
            except torch.OutOfMemoryError:
                if len(batch) > 1:
                    raise
                return  # Nothing smaller can be tried: this one reply is not judged, the others are.
            for index, probabilities in zip(batch, found.tolist(), strict=True):
                scores[index] = probabilities

        run_in_batches([len(row.ids) for row in rows], classify, batch_size=self._settings.batch_size)
        return scores

    def _probabilities(self, model: Any, rows: Sequence[Encoded]) -> Tensor:
        pad_id = _unused_id(rows, self._pad_id)
        # Decoders pool the last token that is not this one: a row must not end in it.
        model.config.get_text_config().pad_token_id = pad_id
        device = embedding_weight(model).device
        ids, mask = pad([row.ids for row in rows], pad_id, left=False, device=device)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if rows[0].type_ids is not None:
            inputs["token_type_ids"], _ = pad([row.type_ids or () for row in rows], 0, left=False, device=device)
        with torch.inference_mode():
            logits: Tensor = model(**inputs).logits.float().cpu()
        return logits.sigmoid() if self._sigmoid else logits.softmax(dim=-1)

    def _verdict(self, record_id: str, probabilities: list[float] | None, reason: str) -> Verdict:
        if probabilities is None:
            return Verdict(id=record_id, label="error", reason="GPU memory ran out on this reply alone")
        if not all(map(math.isfinite, probabilities)):
            return Verdict(id=record_id, label="error", reason="the model's scores are not finite")
        harmful = {self._labels[index]: probabilities[index] for index in self._harmful}
        p_harmful = max(harmful.values()) if self._sigmoid else min(1.0, sum(harmful.values()))
        found = tuple(label for label, value in harmful.items() if value >= self._settings.threshold)
        return Verdict(
            id=record_id,
            label="harmful" if p_harmful >= self._settings.threshold else "safe",
            p_harmful=p_harmful,
            categories=found if len(harmful) > 1 else (),
            reason=reason,
        )

    def _model(self) -> Any:
        if self._loaded is None:
            with errors_named(self._name):
                self._loaded = load_classifier(self._settings.source)
        return self._loaded.model


def build_classifier(content: Mapping[str, Any], name: str) -> ClassifierJudge:
    """A judge of kind ``classifier``.

    Args:
        content: Of the judge file, without ``kind``.
        name: Of the judge file.

    Raises:
        RecipeError: An unknown or wrong setting.
        ModelError: The model can't be found or read.
        EvaluationError: The settings don't fit the model's head.
    """
    return ClassifierJudge(settings_from_dict(ClassifierSettings, content, f"judge {name}", "judge file"), name)


def _is_sigmoid(settings: ClassifierSettings, config: PreTrainedConfig) -> bool:
    if settings.activation != "auto":
        return settings.activation == "sigmoid"
    return config.num_labels == 1 or config.problem_type == "multi_label_classification"


def _harmful_labels(settings: ClassifierSettings, labels: Sequence[str], name: str, *, sigmoid: bool) -> list[int]:
    """Numbers of the labels that mean harm."""
    wanted = settings.harmful
    if len(labels) == 1 and wanted is None:
        wanted = ANY
    if wanted is None:
        raise EvaluationError(f"judge {name}: say which labels mean harm (harmful); it has {', '.join(labels)}")
    if wanted == ANY:
        wanted = tuple(range(len(labels)))
    elif isinstance(wanted, str):
        wanted = (wanted,)
    chosen = [_label_number(entry, labels, name) for entry in wanted]
    if not chosen or (not sigmoid and len(set(chosen)) == len(labels)):
        raise EvaluationError(
            f"judge {name}: harmful names {len(chosen)} of {len(labels)} labels, so that every verdict would be the "
            "same; name some of them, or set activation: sigmoid where each label is a kind of harm of its own"
        )
    return chosen


def _label_number(entry: str | int, labels: Sequence[str], name: str) -> int:
    if isinstance(entry, int) and 0 <= entry < len(labels):
        return entry
    if entry not in labels:
        raise EvaluationError(
            f"judge {name}: harmful names {entry!r}, which is no label of the model."
            f"{did_you_mean(str(entry), labels)} It has {', '.join(labels)}"
        )
    return labels.index(str(entry))


def longest_input(config: PreTrainedConfig, tokenizer_limit: int) -> int:
    """Most tokens that the model has positions for, so far as its files say so."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(tokenizer_limit, positions) if positions else tokenizer_limit


def _unused_id(rows: Sequence[Encoded], preferred: int) -> int:
    """A token id that no row holds."""
    used = {token for row in rows for token in row.ids}
    return preferred if preferred not in used else next(index for index in range(len(used) + 1) if index not in used)
