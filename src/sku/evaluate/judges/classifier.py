"""A sequence classifier as judge: one forward pass gives the probability that a reply is harmful.

Three kinds of heads are read: classes of which some are harmful (softmax), independent kinds of harm (sigmoid, as
beaver-dam's fourteen), and a single logit that is positive for harm (sigmoid, as a cost model's).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sku.config import settings_from_dict
from sku.config.check import Count, validated
from sku.errors import EvaluationError, RecipeError, did_you_mean
from sku.evaluate.generation import pad
from sku.evaluate.judges import Label, Verdict
from sku.evaluate.judges.local_models import (
    PROMPT,
    REPLY,
    ConversationEncoder,
    Encoded,
    LocalJudge,
    LocalModelSettings,
    longest_input,
)
from sku.models import LoadedModel, embedding_weight, load_classifier

ANY = "any"
"""Every label of the head is a kind of harm."""


@validated
class ClassifierSettings(LocalModelSettings):
    """A judge file of kind ``classifier``."""

    max_length: Count = 512
    template: str | None = None
    """The text to classify, with ``{reply}`` and, where the model reads it, ``{prompt}``; empty: a pair of texts."""
    harmful: str | tuple[str, ...] | None = None
    """Labels (names of the model's ``id2label``) that mean harm, or ``any``; a single logit needs none."""
    activation: Literal["auto", "softmax", "sigmoid"] = "auto"
    """``auto``: sigmoid where the model is multi-label or has a single logit, else softmax."""

    def __post_init__(self) -> None:
        if self.template is not None and REPLY not in self.template:
            raise RecipeError("template has no {reply}: the judge would read the same text every time")


class ClassifierJudge(LocalJudge[list[float]]):
    """Judges by the probabilities of a sequence classifier: harmful from the threshold on."""

    settings: ClassifierSettings

    def __init__(self, settings: ClassifierSettings, name: str) -> None:
        """Reads configuration and tokenizer; the weights follow with the first reply.

        Args:
            settings: Of the judge file.
            name: Of the judge file.

        Raises:
            ModelError: The model can't be found or read.
            EvaluationError: ``harmful`` or ``activation`` don't fit the model's head.
        """
        super().__init__(settings, name)
        template = settings.template
        self.card = self.make_card(
            reads_prompt=template is None or PROMPT in template, threshold=settings.threshold, labels_refusals=False
        )
        self._labels = [str(label) for _, label in sorted((self.config.id2label or {}).items())]
        is_sigmoid = self.config.num_labels == 1 or self.config.problem_type == "multi_label_classification"
        self._sigmoid = is_sigmoid if settings.activation == "auto" else settings.activation == "sigmoid"
        self._harmful = _harmful_labels(settings, self._labels, name, sigmoid=self._sigmoid)
        limit = longest_input(self.config, min(settings.max_length, self.tokenizer.model_max_length))
        self.encoders = [ConversationEncoder(self.tokenizer, template, markers=settings.markers, max_length=limit)]

    def load(self) -> LoadedModel:
        """Reads the weights."""
        return load_classifier(self.settings.source)

    def ask(self, loaded: LoadedModel, rows: Sequence[Encoded]) -> list[list[float]]:
        """Probabilities of all labels per row."""
        model: Any = loaded.model
        pad_id = _unused_id(rows, int(self.tokenizer.pad_token_id))
        # Decoders pool the last token that is not this one: a row must not end in it.
        model.config.get_text_config().pad_token_id = pad_id
        with torch.inference_mode():
            logits: Tensor = model(**model_inputs(rows, pad_id, embedding_weight(model).device)).logits.float().cpu()
        found: list[list[float]] = (logits.sigmoid() if self._sigmoid else logits.softmax(dim=-1)).tolist()
        return found

    def verdict(self, record_id: str, answers: Sequence[list[float]]) -> Verdict:
        """Harmful from the threshold on."""
        (probabilities,) = answers
        if not all(map(math.isfinite, probabilities)):
            return Verdict(id=record_id, label="error", reason="the model's scores are not finite")
        harmful = [probabilities[self._labels.index(label)] for label in self._harmful]
        p_harmful = max(harmful) if self._sigmoid else min(1.0, sum(harmful))
        label: Label = "harmful" if p_harmful >= self.settings.threshold else "safe"
        return Verdict(id=record_id, label=label, p_harmful=p_harmful)


def model_inputs(rows: Sequence[Encoded], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """A batch as a classifier takes it, padded on the right."""
    ids, mask = pad([row.ids for row in rows], pad_id, left=False, device=device)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if rows[0].type_ids is not None:
        inputs["token_type_ids"], _ = pad([row.type_ids or () for row in rows], 0, left=False, device=device)
    return inputs


def build(content: Mapping[str, Any], name: str) -> ClassifierJudge:
    """The judge of a judge file's settings."""
    return ClassifierJudge(settings_from_dict(ClassifierSettings, content, f"judge {name}", "judge file"), name)


def _harmful_labels(settings: ClassifierSettings, labels: Sequence[str], name: str, *, sigmoid: bool) -> list[str]:
    """The labels that mean harm."""
    wanted = settings.harmful or (ANY if len(labels) == 1 else ())
    chosen = list(labels if wanted == ANY else (wanted,) if isinstance(wanted, str) else wanted)
    if wrong := [entry for entry in chosen if entry not in labels]:
        raise EvaluationError(
            f"judge {name}: harmful names {wrong[0]!r}, which is no label of the model."
            f"{did_you_mean(wrong[0], labels)} It has {', '.join(labels)}"
        )
    if not chosen or (not sigmoid and len(set(chosen)) == len(labels)):
        raise EvaluationError(
            f"judge {name}: harmful names {len(chosen)} of the labels {', '.join(labels)}: name some of them, or set "
            "activation: sigmoid where each label is a kind of harm of its own"
        )
    return chosen


def _unused_id(rows: Sequence[Encoded], preferred: int) -> int:
    """A token id that no row holds."""
    used = {token for row in rows for token in row.ids}
    return preferred if preferred not in used else next(index for index in range(len(used) + 1) if index not in used)
