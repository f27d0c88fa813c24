"""A generative guard model as judge: a language model that answers ``safe`` or ``unsafe``, described by a judge file.

Two ways to read its answer, alone or together: the probabilities of two words at the first position that it writes
(``positive`` against ``negative``), and a regular expression over what it writes (``regex``, with the named groups
``label``, ``categories`` and ``refusal``). With both, the words decide and the text adds kinds of harm and refusals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from sku.config import settings_from_dict
from sku.errors import EvaluationError, one_line
from sku.evaluate.batching import pad, run_in_batches
from sku.evaluate.generation import decoding_settings, stop_token_ids
from sku.evaluate.judges.base import Label, Verdict
from sku.evaluate.judges.conversations import PROMPT, REPLY, ConversationEncoder, Encoded, Unreadable
from sku.evaluate.judges.guard_answers import Answer, GuardSettings, read_answer, word_ids
from sku.evaluate.judges.local_models import (
    cut_reason,
    errors_named,
    fields_read,
    judged_text,
    make_card,
    tell_cuts,
)
from sku.evaluate.records import GenerationRecord
from sku.models import LoadedModel, embedding_weight, load_config, load_model, load_tokenizer


class GuardJudge:
    """Judges by what a guard model answers."""

    def __init__(self, settings: GuardSettings, name: str) -> None:
        """Reads configuration and tokenizer; the weights follow with the first reply.

        Args:
            settings: Of the judge file.
            name: Of the judge file.

        Raises:
            ModelError: The model can't be found or read.
            EvaluationError: Its chat template fails, or can't tell the words apart.
        """
        self._settings, self._name = settings, name
        self._loaded: LoadedModel | None = None
        with errors_named(name):
            config, tokenizer = load_config(settings.source), load_tokenizer(settings.source)
            self.card = make_card(
                settings,
                name,
                needs=fields_read(settings, prompt=settings.prompt is None or "{prompt}" in settings.prompt),
                threshold=settings.threshold if settings.positive else None,
                labels_refusals=settings.finds_refusals,
                tells_safe=bool(settings.positive) or "safe" in settings.labels.values(),
            )
        self._policies = dict(settings.policies) or {"": ""}
        positions = getattr(config.get_text_config(), "max_position_embeddings", None) or settings.max_length
        self._new_tokens = settings.max_new_tokens if settings.regex else 1
        self._limit = min(settings.max_length, positions - self._new_tokens)
        self._encoders = {
            policy: ConversationEncoder(
                tokenizer,
                _conversation(settings, tokenizer, text, name),
                markers=settings.markers,
                add_special_tokens=settings.prompt is not None,
                max_length=self._limit,
            )
            for policy, text in self._policies.items()
        }
        self._words = word_ids(tokenizer, settings, name) if settings.positive else None

    def judge(self, records: Sequence[GenerationRecord]) -> list[Verdict]:
        """One verdict per record; harmful where any policy is broken, ``error`` where an answer can't be read."""
        asked = [
            [encoder.encode(record.prompt, judged_text(record, self._settings)) for encoder in self._encoders.values()]
            for record in records
        ]
        answers = iter(self._answers([row for rows in asked for row in rows if isinstance(row, Encoded)]))
        verdicts = []
        for record, rows in zip(records, asked, strict=True):
            own = [Answer(problem=row.reason) if isinstance(row, Unreadable) else next(answers) for row in rows]
            verdicts.append(self._verdict(record.id, own, cut_reason(rows)))
        tell_cuts(verdicts, self.card.name, self._limit)
        return verdicts

    def _answers(self, rows: Sequence[Encoded]) -> list[Answer]:
        answers = [Answer(problem="GPU memory ran out on this reply alone")] * len(rows)
        if not rows:
            return answers
        model, tokenizer = self._ready()

        def ask(batch: list[int]) -> None:
            try:
                found = self._generate(model, tokenizer, [rows[index] for index in batch])
            except torch.OutOfMemoryError:
                if len(batch) > 1:
                    raise
                return  # Nothing smaller can be tried: this one reply is not judged, the others are.
            for index, answer in zip(batch, found, strict=True):
                answers[index] = answer

        run_in_batches([len(row.ids) for row in rows], ask, batch_size=self._settings.batch_size)
        return answers

    def _generate(self, model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded]) -> list[Answer]:
        pad_id = int(tokenizer.pad_token_id)
        ids, mask = pad([row.ids for row in rows], pad_id, left=True, device=embedding_weight(model).device)
        with torch.inference_mode():
            output = model.generate(input_ids=ids, attention_mask=mask)
        texts = tokenizer.batch_decode(output.sequences[:, ids.shape[1] :], skip_special_tokens=True)
        if self._words is None:
            return [Answer(text=text) for text in texts]
        probabilities = output.logits[0].float().softmax(dim=-1).cpu()
        masses = zip(*(_mass(probabilities, words) for words in self._words), strict=True)
        return [Answer(text=text, mass=mass) for text, mass in zip(texts, masses, strict=True)]

    def _verdict(self, record_id: str, answers: Sequence[Answer], reason: str) -> Verdict:
        """Puts the answers about one reply together."""
        parts = [read_answer(answer, self._settings, record_id) for answer in answers]
        order: tuple[Label, ...] = ("harmful", "error", "refusal", "safe")
        label = min((part.label for part in parts), key=order.index)
        known = [part.p_harmful for part in parts if part.p_harmful is not None]
        if label == "error":
            return Verdict(
                id=record_id, label=label, reason="; ".join(sorted({part.reason for part in parts if part.reason}))
            )
        broken = (policy for policy, part in zip(self._policies, parts, strict=True) if part.label == "harmful")
        named = (category for part in parts if part.label == "harmful" for category in part.categories)
        return Verdict(
            id=record_id,
            label=label,
            p_harmful=max(known, default=None),
            categories=tuple(dict.fromkeys(entry for entry in (*broken, *named) if entry)),
            reason=reason,
        )

    def _ready(self) -> tuple[Any, PreTrainedTokenizerBase]:
        """The model, set to answer greedily, and its tokenizer."""
        if self._loaded is None:
            with errors_named(self._name):
                loaded = load_model(self._settings.source)
            model: Any = loaded.model
            stop_ids = stop_token_ids(model, loaded.tokenizer)
            # In place of the model's own, which may sample.
            model.generation_config = GenerationConfig(
                **decoding_settings(stop_ids, self._new_tokens),
                pad_token_id=loaded.tokenizer.pad_token_id,
                return_dict_in_generate=True,
                output_logits=self._words is not None,
            )
            self._loaded = loaded
        return self._loaded.model, self._loaded.tokenizer


def build_guard(content: Mapping[str, Any], name: str) -> GuardJudge:
    """A judge of kind ``guard``.

    Args:
        content: Of the judge file, without ``kind``.
        name: Of the judge file.

    Raises:
        RecipeError: An unknown or wrong setting.
        ModelError: The model can't be found or read.
        EvaluationError: Its chat template fails, or can't tell the words apart.
    """
    return GuardJudge(settings_from_dict(GuardSettings, content, f"judge {name}", "judge file"), name)


def _conversation(settings: GuardSettings, tokenizer: PreTrainedTokenizerBase, policy: str, name: str) -> str:
    """The text that the guard reads, with markers where prompt and reply belong."""
    if settings.prompt is not None:
        text = settings.prompt.replace("{policy}", policy).replace("{prompt}", PROMPT).replace("{reply}", REPLY)
    else:
        text = _rendered(settings, tokenizer, policy, name)
    start = settings.answer_start
    return text if not start or text.endswith(start) else text + start


def _rendered(settings: GuardSettings, tokenizer: PreTrainedTokenizerBase, policy: str, name: str) -> str:
    def content(text: str) -> Any:
        return [{"type": "text", "text": text}] if settings.content_parts else text

    messages = [{"role": "user", "content": content(PROMPT)}, {"role": "assistant", "content": content(REPLY)}]
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=settings.add_generation_prompt,
            **_with_policy(settings.template_kwargs, policy),
        )
    except Exception as error:  # noqa: BLE001 - a template is a program of the model's author: it can raise anything.
        raise EvaluationError(
            f"judge {name}: the chat template of {settings.model} fails: {one_line(error)}. Set prompt "
            "to the text that this guard reads, or content_parts if its messages hold parts"
        ) from None
    assert isinstance(text, str)
    if REPLY not in text:
        raise EvaluationError(f"judge {name}: the chat template of {settings.model} leaves out the assistant's reply")
    return text


def _with_policy(value: Any, policy: str) -> Any:
    if isinstance(value, str):
        return value.replace("{policy}", policy)
    if isinstance(value, Mapping):
        return {key: _with_policy(entry, policy) for key, entry in value.items()}
    return value


def _mass(probabilities: Tensor, words: Sequence[int]) -> list[float]:
    """``[B]``, total probability of some tokens."""
    return [float(value) for value in probabilities[:, list(words)].sum(dim=-1)]
