"""How a prompt and its answer are written for a model: by its chat template, or as the paper does.

What is trained on and what the model is asked with come from the same ``render``, so they can't differ.

And in a framing: a story, a role, an exam, a claim of permission around the same request. A model that learns to
refuse bare requests alone answers them inside a story. These framings (``framings.txt``) are our own, other than those
of the attack that measures it (``sku/attacks/templates.txt``), though some are of the same kind. Harmful and normal
prompts get them alike, so that none of them is a sign of harm.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from sku.config import PromptFormatName
from sku.data.examples import E, group_of
from sku.errors import EvaluationError, ModelError, one_line


@dataclass(frozen=True, kw_only=True)
class RenderedText:
    """Text of one example. The model reads ``prompt_text + answer_text + end_text``."""

    prompt_text: str
    """All that stands before the answer; generation starts after it."""
    answer_text: str
    """Answer with the space, if any, that the format puts before it: so the space falls into the answer's token."""
    end_text: str
    """What ends the answer, ``""`` where the tokenizer has no such token."""
    add_special_tokens: bool
    """Whether the tokenizer must add its own special tokens such as BOS; a chat template writes them itself."""
    user_start: int
    """Where in ``prompt_text`` the user's own words begin, in characters."""
    user_end: int


@dataclass(frozen=True)
class PaperFormat:
    r"""``### Question: {prompt}\n ### Answer: {answer}``, as in the authors' code (franciscoliu/SKU utils.py)."""

    end_text: str
    """What ends an answer."""
    name: ClassVar = "paper"

    def render(self, prompt: str, answer: str = "") -> RenderedText:
        """Writes one example; the space belongs to the answer, whose first token holds it."""
        start = "### Question: "
        return RenderedText(
            prompt_text=f"{start}{prompt}\n ### Answer:",
            answer_text=f" {answer}" if answer else "",
            end_text=self.end_text,
            add_special_tokens=True,
            user_start=len(start),
            user_end=len(start) + len(prompt),
        )


@dataclass(frozen=True)
class _Frame:
    """What a template writes around one question and its answer."""

    before: str
    after: str
    space: str
    """White space between the generation prompt and the answer."""
    end_text: str
    from_conversation: bool
    """Whether the finished conversation, not the generation prompt, says what stands before an answer."""
    has_system_turn: bool
    """Whether an empty system turn stands first, as some templates demand."""


@dataclass(frozen=True)
class ChatFormat:
    """The tokenizer's chat template.

    The answer stands where the template puts it in a finished conversation. Most templates end their generation
    prompt just there. Where one puts white space between (Llama 2), that space belongs to the answer; where it puts
    more (the empty thoughts of Qwen 3) or less (templates that open a thought), the finished conversation holds.
    """

    tokenizer: PreTrainedTokenizerBase
    frame: _Frame
    end_text: str
    name: ClassVar = "chat"

    def render(self, prompt: str, answer: str = "") -> RenderedText:
        """Writes one example by the template.

        Raises:
            ModelError: The template fails on this prompt or writes other text around it than around others.
        """
        frame = self.frame
        prompt_text = self._prompt_text(prompt, frame)
        if not _fits(prompt_text, frame):
            # A template may write the date, and a run may last past midnight.
            frame = _derive_frame(self.tokenizer, has_system_turn=frame.has_system_turn)
            prompt_text = self._prompt_text(prompt, frame)
        if not _fits(prompt_text, frame):
            raise ModelError(
                "the chat template writes other text around this prompt than around others, so the prompt can't be "
                "told from the template: use prompt_format paper"
            )
        return RenderedText(
            prompt_text=prompt_text,
            answer_text=f"{frame.space}{answer}" if answer else "",
            end_text=self.end_text,
            add_special_tokens=False,
            user_start=len(frame.before),
            user_end=len(prompt_text) - len(frame.after),
        )

    def _prompt_text(self, prompt: str, frame: _Frame) -> str:
        if not frame.from_conversation:
            return _written(self.tokenizer, prompt, has_system_turn=frame.has_system_turn)
        finished = _written(self.tokenizer, prompt, _ANSWER_MARK, has_system_turn=frame.has_system_turn)
        return finished[: max(finished.rfind(_ANSWER_MARK), 0)]


PromptFormat = PaperFormat | ChatFormat
"""One way to write a prompt and its answer."""


def resolve_prompt_format(name: PromptFormatName, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """The prompt format of a run.

    Args:
        name: ``chat``, ``paper``, or ``auto``: chat where the tokenizer has a chat template, paper elsewhere.
        tokenizer: Of the model to unlearn.

    Returns:
        The format.

    Raises:
        ModelError: ``chat`` without a chat template, or a template that can't write a question and its answer.
    """
    if name == "paper" or (name == "auto" and not tokenizer.chat_template):
        return PaperFormat(end_text=_end_token(tokenizer))
    if not tokenizer.chat_template:
        raise ModelError("prompt_format is chat, but the tokenizer has no chat template: use paper or auto")
    try:
        frame = _derive_frame(tokenizer, has_system_turn=False)
    except ModelError as error:
        try:
            frame = _derive_frame(tokenizer, has_system_turn=True)
        except ModelError:
            raise error from None
    return ChatFormat(tokenizer, frame, frame.end_text or _end_token(tokenizer))


_USER_MARK, _ANSWER_MARK = "skuusermark", "skuanswermark"
"""Words that no template contains: where they come out is where the user's words and the answer stand."""


def _fits(prompt_text: str, frame: _Frame) -> bool:
    is_long_enough = len(prompt_text) >= len(frame.before) + len(frame.after)
    return is_long_enough and prompt_text.startswith(frame.before) and prompt_text.endswith(frame.after)


def _derive_frame(tokenizer: PreTrainedTokenizerBase, *, has_system_turn: bool) -> _Frame:
    before, after = _around(_written(tokenizer, _USER_MARK, has_system_turn=has_system_turn), _USER_MARK)
    finished = _written(tokenizer, _USER_MARK, _ANSWER_MARK, has_system_turn=has_system_turn)
    until_answer, end = _around(finished, _ANSWER_MARK)
    finished_before, finished_after = _around(until_answer, _USER_MARK)
    between = finished_after.removeprefix(after)
    if finished_before == before and finished_after.startswith(after) and not between.strip():
        return _Frame(before, after, between, end.rstrip(), from_conversation=False, has_system_turn=has_system_turn)
    return _Frame(
        finished_before, finished_after, "", end.rstrip(), from_conversation=True, has_system_turn=has_system_turn
    )


def _written(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str | None = None, *, has_system_turn: bool
) -> str:
    """A conversation by the template; without an answer up to where one begins."""
    turns = [{"role": "system", "content": ""}] if has_system_turn else []
    turns.append({"role": "user", "content": prompt})
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None)
    except Exception as error:  # noqa: BLE001 - a template is a program of its own and can raise anything
        reason = one_line(error)
        raise ModelError(f"the chat template fails on a conversation ({reason}): use prompt_format paper") from None
    assert isinstance(text, str)
    return text


def _around(text: str, mark: str) -> tuple[str, str]:
    if text.count(mark) != 1:
        raise ModelError(
            f"the chat template writes a message {text.count(mark)} times instead of once: use prompt_format paper"
        )
    before, _, after = text.partition(mark)
    return before, after


def _end_token(tokenizer: PreTrainedTokenizerBase) -> str:
    end = tokenizer.eos_token
    return end if isinstance(end, str) else ""


PLACE = "{prompt}"
"""Where the request stands, in a framing and in a template of the attack."""


@cache
def framings() -> tuple[str, ...]:
    """All of them, each with ``{prompt}`` in it."""
    text = (resources.files("sku.data") / "framings.txt").read_text(encoding="utf-8")
    return tuple(parse_templates(text, "framings.txt"))


def parse_templates(text: str, where: str) -> list[str]:
    """One template a line; empty lines don't count.

    Args:
        text: Of the file.
        where: Its name, for messages.

    Returns:
        The templates, their line breaks put in.

    Raises:
        EvaluationError: There is none, one is there twice, or a line does not hold ``{prompt}`` just once.
    """
    templates: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        if line.count(PLACE) != 1:
            raise EvaluationError(
                f"{where} line {number} holds {PLACE} {line.count(PLACE)} times; each template must hold it once, "
                "where the request goes"
            )
        template = line.strip().replace(r"\n", "\n")
        if template in templates:
            raise EvaluationError(f"{where} line {number} repeats template {templates.index(template) + 1}: remove it")
        templates.append(template)
    if not templates:
        raise EvaluationError(f"{where} holds no template: write one a line, with {PLACE} in it")
    return templates


def framed(examples: Sequence[E], share: float, seed: int) -> tuple[E, ...]:
    """Puts a share of the examples in a framing; answers stay, and relatives stay relatives.

    Args:
        examples: Of one split.
        share: From 0 for none to 1 for all.
        seed: Decides which, and the framing of each.

    Returns:
        The examples in the same order.
    """
    found = []
    for place, example in enumerate(examples):
        draw = random.Random(f"{seed}/framing/{place}")
        if draw.random() < share:
            prompt = draw.choice(framings()).replace(PLACE, example.prompt)
            example = replace(example, prompt=prompt, group=group_of(example))
        found.append(example)
    return tuple(found)
