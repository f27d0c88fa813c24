"""What a guard model's answer says: its settings, the words it begins with, and the text that it writes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from sku.config import ModelConfig
from sku.errors import EvaluationError, RecipeError
from sku.evaluate.judges.base import Label, Verdict
from sku.evaluate.judges.local_models import LocalModelSettings

Meaning = Literal["harmful", "safe"]
_MEANINGS: tuple[Meaning, ...] = ("harmful", "safe")
_YES = {"yes", "true"}
_WORD_STARTS = "\u0120\u2581 "
"""How vocabularies mark a token that begins a word: byte-level ones, SentencePiece, and plain text."""


@dataclass(frozen=True, kw_only=True)
class GuardSettings(LocalModelSettings):
    """A judge file of kind ``guard``."""

    gguf_file: str | None = None
    """Name of a GGUF file inside ``model``: it is dequantized while loading."""
    prompt: str | None = None
    """The whole text to read, with ``{prompt}``, ``{reply}`` and ``{policy}``; empty: the model's chat template."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template; ``{policy}`` inside stands for the policy."""
    content_parts: bool = False
    """Whether the chat template wants the content of a message as a list of parts, as multimodal ones do."""
    add_generation_prompt: bool = False
    """Whether the chat template is asked to open the guard's own turn."""
    answer_start: str = ""
    """What the guard always writes first; put behind the conversation where that does not end in it already."""
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
    labels: Mapping[str, str] = field(default_factory=dict)
    """What the group ``label`` can hold, in any case -> ``harmful`` or ``safe``."""
    max_new_tokens: int = 32
    """Longest answer where there is a ``regex``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.positive) != bool(self.negative):
            raise RecipeError("positive and negative go together: one is set and the other is not")
        if not self.positive and self.regex is None:
            raise RecipeError("neither positive and negative nor regex says how to read the guard's answer")
        if self.prompt is not None and "{reply}" not in self.prompt:
            raise RecipeError("prompt has no {reply}: the guard would read the same text every time")
        self._check_regex()

    def _check_regex(self) -> None:
        if self.regex is None:
            return
        try:
            groups = re.compile(self.regex).groupindex
        except re.error as error:
            raise RecipeError(f"regex is not a regular expression: {error}") from None
        if not self.positive and "label" not in groups:
            raise RecipeError("regex has no group (?P<label>...), and there are no positive and negative words")
        wrong = sorted(name for name, meaning in self.labels.items() if meaning not in _MEANINGS)
        if wrong or ("label" in groups and not self.positive and not self.labels):
            raise RecipeError(
                f"labels must say for each label whether it is harmful or safe (wrong: {wrong or 'none'})"
            )

    @property
    def source(self) -> ModelConfig:
        """Where the model is and how it is held."""
        return dataclasses.replace(super().source, gguf_file=self.gguf_file)

    @property
    def finds_refusals(self) -> bool:
        """Whether its answer says whether the reply is a refusal."""
        return self.regex is not None and "refusal" in re.compile(self.regex).groupindex


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a guard answered about one reply under one policy."""

    mass: tuple[float, float] | None = None
    """Probabilities of the positive and of the negative words."""
    text: str = ""
    problem: str = ""
    """Why there is no answer."""


def read_answer(answer: Answer, settings: GuardSettings, record_id: str) -> Verdict:
    """What one answer says of a reply.

    Args:
        answer: Of the guard.
        settings: How to read it.
        record_id: Of the reply.

    Returns:
        A verdict; its label is ``error`` where the answer can't be read.
    """
    found = None if settings.regex is None else re.search(settings.regex, answer.text)
    groups = {} if found is None else {key: value for key, value in found.groupdict().items() if value}
    label, p_harmful, problem = _label(answer, settings, groups.get("label", ""))
    if label == "safe" and groups.get("refusal", "").casefold() in _YES:
        label = "refusal"
    categories = (entry.strip() for entry in re.split(r"[,\n]", groups.get("categories", "")))
    return Verdict(
        id=record_id,
        label=label,
        p_harmful=p_harmful,
        categories=tuple(entry for entry in categories if entry and entry.casefold() != "none"),
        reason=problem,
    )


def _label(answer: Answer, settings: GuardSettings, written: str) -> tuple[Label, float | None, str]:
    """Label, probability of harm, and what is wrong with the answer."""
    if answer.problem:
        return "error", None, answer.problem
    if answer.mass is not None:
        positive, negative = answer.mass
        if not positive + negative >= settings.least_mass:  # Also where it is NaN.
            return "error", None, f"the guard's answer is none of its words (probability {positive + negative:.2f})"
        p_harmful = positive / (positive + negative)
        return "harmful" if p_harmful >= settings.threshold else "safe", p_harmful, ""
    meanings = {name.casefold(): meaning for name, meaning in settings.labels.items()}
    meaning = meanings.get(written.strip().casefold())
    if meaning is None:
        what = f"no label but {answer.text.strip()[:40]!r}" if answer.text.strip() else "nothing"
        return "error", None, f"the guard wrote {what}"
    return "harmful" if meaning == "harmful" else "safe", None, ""


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
