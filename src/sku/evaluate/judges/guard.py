"""A generative guard model as judge: a language model that answers ``safe`` or ``unsafe``, described by a judge file.

Two ways to read its answer: by the probabilities of two words at the first position that it writes (``positive``
against ``negative``), or by a regular expression over what it writes, with the named groups ``label`` and ``refusal``.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from sku.config import settings_from_dict
from sku.config.check import Count, validated
from sku.errors import EvaluationError, RecipeError, one_line
from sku.evaluate.generation import pad
from sku.evaluate.generation.decoding import decoding_settings, stop_token_ids
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
from sku.models import LoadedModel, embedding_weight, load_model

Answer = tuple[float, float] | str
"""Probabilities of the positive and of the negative words; or what the guard wrote."""
_WORD_STARTS = "\u0120\u2581 "
"""How vocabularies mark a token that begins a word: byte-level ones, SentencePiece, and plain text."""


@validated
class GuardSettings(LocalModelSettings):
    """A judge file of kind ``guard``."""

    prompt: str | None = None
    """The whole text to read, with ``{prompt}``, ``{reply}`` and ``{policy}``; empty: the model's chat template."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template; ``{policy}`` inside stands for the policy."""
    content_parts: bool = False
    """Whether the chat template wants the content of a message as a list of parts, as multimodal ones do."""
    add_generation_prompt: bool = False
    """Whether the chat template is asked to open the guard's own turn."""
    answer_start: str = ""
    """What the guard always writes first; put after the conversation where that does not end in it already."""
    policies: Mapping[str, str] = field(default_factory=dict)
    """Name -> text. The guard is asked once for each; a reply is harmful where it breaks any."""
    positive: tuple[str, ...] = ()
    """First words that mean harm. Their probability over that of both kinds of words is the probability of harm."""
    negative: tuple[str, ...] = ()
    """First words that mean no harm."""
    least_mass: float = 0.5
    """An answer in which these words have less probability than this together is no answer."""
    regex: str | None = None
    """Searched in what the guard writes."""
    labels: Mapping[str, Literal["harmful", "safe"]] = field(default_factory=dict)
    """What the group ``label`` can hold, in any case -> ``harmful`` or ``safe``."""
    max_new_tokens: Count = 32
    """Longest answer where there is a ``regex``."""

    def __post_init__(self) -> None:
        try:
            groups = self.groups
        except re.error as error:
            raise RecipeError(f"regex is not a regular expression: {error}") from None
        if bool(self.positive) != bool(self.negative):
            raise RecipeError("positive and negative go together: one is set and the other is not")
        if bool(self.positive) == ("label" in groups and bool(self.labels)):
            raise RecipeError(
                "set positive and negative words, or else a regex with a group (?P<label>...) and its labels: that is "
                "how the guard's answer is read"
            )
        if self.prompt is not None and REPLY not in self.prompt:
            raise RecipeError("prompt has no {reply}: the guard would read the same text every time")

    @property
    def groups(self) -> Mapping[str, int]:
        """Named groups of ``regex``."""
        return re.compile(self.regex or "").groupindex


class GuardJudge(LocalJudge[Answer]):
    """Judges by what a guard model answers: harmful where any policy is broken."""

    settings: GuardSettings

    def __init__(self, settings: GuardSettings, name: str) -> None:
        """Reads configuration and tokenizer; the weights follow with the first reply.

        Args:
            settings: Of the judge file.
            name: Of the judge file.

        Raises:
            ModelError: The model can't be found or read.
            EvaluationError: Its chat template fails, or can't tell the words apart.
        """
        super().__init__(settings, name)
        self.card = self.make_card(
            reads_prompt=settings.prompt is None or PROMPT in settings.prompt,
            threshold=settings.threshold if settings.positive else None,
            labels_refusals="refusal" in settings.groups,
            tells_safe=bool(settings.positive) or "safe" in settings.labels.values(),
        )
        self._new_tokens = 1 if settings.positive else settings.max_new_tokens
        positions = longest_input(self.config, settings.max_length + self._new_tokens)
        self.encoders = [
            ConversationEncoder(
                self.tokenizer,
                _conversation(settings, self.tokenizer, text, name),
                markers=settings.markers,
                add_special_tokens=settings.prompt is not None,
                max_length=positions - self._new_tokens,
            )
            for text in settings.policies.values() or ("",)
        ]
        self._words = word_ids(self.tokenizer, settings, name) if settings.positive else None

    def load(self) -> LoadedModel:
        """Reads the weights, and sets the model to answer greedily, in place of its own settings, which may sample."""
        loaded = load_model(self.settings.source)
        model: Any = loaded.model
        model.generation_config = GenerationConfig(
            **decoding_settings(stop_token_ids(model, loaded.tokenizer), self._new_tokens),
            pad_token_id=loaded.tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_logits=self._words is not None,
        )
        return loaded

    def ask(self, loaded: LoadedModel, rows: Sequence[Encoded]) -> Sequence[Answer]:
        """What the guard writes on each."""
        model: Any = loaded.model
        pad_id = int(loaded.tokenizer.pad_token_id)
        ids, mask = pad([row.ids for row in rows], pad_id, left=True, device=embedding_weight(model).device)
        with torch.inference_mode():
            output = model.generate(input_ids=ids, attention_mask=mask)
        if self._words is None:
            return loaded.tokenizer.batch_decode(output.sequences[:, ids.shape[1] :], skip_special_tokens=True)
        probabilities: Tensor = output.logits[0].float().softmax(dim=-1).cpu()
        positive, negative = (probabilities[:, words].sum(dim=-1).tolist() for words in self._words)
        return list(zip(positive, negative, strict=True))

    def verdict(self, record_id: str, answers: Sequence[Answer]) -> Verdict:
        """Harmful where any policy is broken, ``error`` where an answer can't be read."""
        parts = [read_answer(answer, self.settings, record_id) for answer in answers]
        order: tuple[Label, ...] = ("harmful", "error", "refusal", "safe")
        worst = min(parts, key=lambda part: order.index(part.label))
        known = [part.p_harmful for part in parts if part.p_harmful is not None]
        return worst if worst.label == "error" else dataclasses.replace(worst, p_harmful=max(known, default=None))


def build(content: Mapping[str, Any], name: str) -> GuardJudge:
    """The judge of a judge file's settings."""
    return GuardJudge(settings_from_dict(GuardSettings, content, f"judge {name}", "judge file"), name)


def read_answer(answer: Answer, settings: GuardSettings, record_id: str) -> Verdict:
    """What one answer says of a reply; the label is ``error`` where it can't be read."""
    if isinstance(answer, tuple):
        positive, negative = answer
        if not positive + negative >= settings.least_mass:  # Also where it is NaN.
            reason = f"the guard's answer is none of its words (probability {positive + negative:.2f})"
            return Verdict(id=record_id, label="error", reason=reason)
        p_harmful = positive / (positive + negative)
        label: Label = "harmful" if p_harmful >= settings.threshold else "safe"
        return Verdict(id=record_id, label=label, p_harmful=p_harmful)
    found = re.search(settings.regex or "", answer)
    groups = {} if found is None else found.groupdict("")
    meanings = {name.casefold(): meaning for name, meaning in settings.labels.items()}
    label = meanings.get(groups.get("label", "").strip().casefold(), "error")
    if label == "safe" and groups.get("refusal", "").casefold() == "yes":
        label = "refusal"
    reason = f"the guard wrote no label but {answer.strip()[:40]!r}" if label == "error" else ""
    return Verdict(id=record_id, label=label, reason=reason)


def word_ids(tokenizer: PreTrainedTokenizerBase, settings: GuardSettings, name: str) -> tuple[list[int], list[int]]:
    """Ids of tokens that the positive and the negative words begin with.

    Raises:
        EvaluationError: A token begins both, or none begins one kind.
    """
    positive, negative = (_ids_of(tokenizer, words) for words in (settings.positive, settings.negative))
    if not positive or not negative or positive & negative:
        raise EvaluationError(
            f"judge {name}: the vocabulary of {settings.model} can't tell {', '.join(settings.positive)} from "
            f"{', '.join(settings.negative)} by one token; use a regex"
        )
    return sorted(positive), sorted(negative)


def _ids_of(tokenizer: PreTrainedTokenizerBase, words: Iterable[str]) -> set[int]:
    """Tokens that are one of the words, with or without a space before it; else the tokens that they begin with."""
    wanted = {word.casefold() for word in words}
    ids = {index for token, index in tokenizer.get_vocab().items() if token.strip(_WORD_STARTS).casefold() in wanted}
    for word in words:
        pieces = tokenizer.encode(word, add_special_tokens=False)
        # A word of several tokens is told by its first, unless that is only the mark that begins every word.
        if pieces and str(tokenizer.convert_ids_to_tokens(pieces[0])).strip(_WORD_STARTS):
            ids.add(pieces[0])
    return ids


def _conversation(settings: GuardSettings, tokenizer: PreTrainedTokenizerBase, policy: str, name: str) -> str:
    """The text that the guard reads, with ``PROMPT`` and ``REPLY`` where these belong."""
    if settings.prompt is not None:
        text = settings.prompt.replace("{policy}", policy)
    else:
        text = _rendered(settings, tokenizer, policy, name)
    return text.removesuffix(settings.answer_start) + settings.answer_start


def _rendered(settings: GuardSettings, tokenizer: PreTrainedTokenizerBase, policy: str, name: str) -> str:
    messages: list[dict[str, Any]] = [
        {"role": role, "content": [{"type": "text", "text": text}] if settings.content_parts else text}
        for role, text in (("user", PROMPT), ("assistant", REPLY))
    ]
    variables = json.dumps(settings.template_kwargs).replace("{policy}", json.dumps(policy)[1:-1])
    options = {"add_generation_prompt": settings.add_generation_prompt, **json.loads(variables)}
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # noqa: BLE001 - a template is a program of the model's author: it can raise anything.
        raise EvaluationError(
            f"judge {name}: the chat template of {settings.model} fails: {one_line(error)}. Set prompt "
            "to the text that this guard reads, or content_parts if its messages hold parts"
        ) from None
    assert isinstance(text, str)
    if REPLY not in text:
        raise EvaluationError(f"judge {name}: the chat template of {settings.model} leaves out the assistant's reply")
    return text
