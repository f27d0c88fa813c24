"""From examples to token ids and labels: only the answer is learned, and all of it.

A prompt and its answer are written for a model by its chat template, or as the paper does. What is trained on and what
the model is asked with come from the same ``render``, so they can't differ.

The whole text is tokenized at once, as the model will meet it, and each token is then placed by the characters it
holds. Tokenizing the parts apart would cut words differently: a prompt that ends in a space, joined to an answer,
gives one token that neither part has.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, takewhile
from typing import Any, ClassVar, NamedTuple

from transformers import PreTrainedTokenizerBase

from sku.config.data import DataConfig, PromptFormatName
from sku.data.examples import Example, is_valid_unicode
from sku.errors import DataError, ModelError, one_line

IGNORE_INDEX = -100
"""Label of a token that is not trained on."""


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


class _Frame(NamedTuple):
    """What a template writes around one question and its answer."""

    before: str
    after: str
    space: str
    """White space between the generation prompt and the answer."""
    end_text: str
    from_conversation: bool
    """Whether the finished conversation, not the generation prompt, says what stands before an answer."""


@dataclass(frozen=True)
class ChatFormat:
    """The tokenizer's chat template.

    The answer stands where the template puts it in a finished conversation. Most templates end their generation
    prompt just there. Where one puts white space between (Llama 2), that space belongs to the answer; where it puts
    more (the empty thoughts of Qwen 3) or less (templates that open a thought), the finished conversation holds.
    """

    tokenizer: PreTrainedTokenizerBase
    frame: _Frame
    name: ClassVar = "chat"

    @property
    def end_text(self) -> str:
        """What ends an answer."""
        return self.frame.end_text

    def render(self, prompt: str, answer: str = "") -> RenderedText:
        """Writes one example by the template.

        Raises:
            ModelError: The template fails on this prompt or writes other text around it than around others.
        """
        frame = self.frame
        text = _before_answer(self.tokenizer, frame, prompt)
        if text is None:  # A template may write the date, and a run may last past midnight.
            frame = _derive_frame(self.tokenizer)
            text = _before_answer(self.tokenizer, frame, prompt)
        if text is None:
            raise ModelError(
                "the chat template writes other text around this prompt than around others, so the prompt can't be "
                "told from the template: use prompt_format paper"
            )
        return RenderedText(
            prompt_text=text,
            answer_text=f"{frame.space}{answer}" if answer else "",
            end_text=self.end_text,
            add_special_tokens=False,
            user_start=len(frame.before),
            user_end=len(text) - len(frame.after),
        )


PromptFormat = PaperFormat | ChatFormat
"""One way to write a prompt and its answer."""


def resolve_prompt_format(name: PromptFormatName, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """The prompt format of a run; ``auto`` is chat where the tokenizer has a chat template, paper elsewhere.

    Raises:
        ModelError: The tokenizer is a slow one, or ``chat`` without a chat template, or a template that can't write a
            question and its answer.
    """
    if not tokenizer.is_fast:
        raise ModelError("the tokenizer can't say which characters a token holds: use a model with a tokenizer.json")
    if name == "paper" or (name == "auto" and not tokenizer.chat_template):
        return PaperFormat(_end_token(tokenizer))
    if not tokenizer.chat_template:
        raise ModelError("prompt_format is chat, but the tokenizer has no chat template: use paper or auto")
    return ChatFormat(tokenizer, _derive_frame(tokenizer))


_USER_MARK, _ANSWER_MARK = "skuusermark", "skuanswermark"
"""Words that no template contains: where they come out is where the user's words and the answer stand."""


def _before_answer(tokenizer: PreTrainedTokenizerBase, frame: _Frame, prompt: str) -> str | None:
    """All that stands before an answer; None where that is not the frame around the prompt."""
    if frame.from_conversation:
        finished = _written(tokenizer, prompt, _ANSWER_MARK)
        text = finished[: max(finished.rfind(_ANSWER_MARK), 0)]
    else:
        text = _written(tokenizer, prompt)
    is_long_enough = len(text) >= len(frame.before) + len(frame.after)
    return text if is_long_enough and text.startswith(frame.before) and text.endswith(frame.after) else None


def _derive_frame(tokenizer: PreTrainedTokenizerBase) -> _Frame:
    before, after = _around(_written(tokenizer, _USER_MARK), _USER_MARK)
    until_answer, end = _around(_written(tokenizer, _USER_MARK, _ANSWER_MARK), _ANSWER_MARK)
    finished_before, finished_after = _around(until_answer, _USER_MARK)
    between, end_text = finished_after.removeprefix(after), end.rstrip() or _end_token(tokenizer)
    if finished_before == before and finished_after.startswith(after) and not between.strip():
        return _Frame(before, after, between, end_text, from_conversation=False)
    return _Frame(finished_before, finished_after, "", end_text, from_conversation=True)


def _written(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str | None = None) -> str:
    """A conversation by the template; without an answer up to where one begins."""
    turns = [{"role": "user", "content": prompt}]
    turns += [] if answer is None else [{"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None)
    except Exception as error:  # noqa: BLE001 - a template is a program of its own and can raise anything
        reason = one_line(error)
        raise ModelError(f"the chat template fails on a conversation ({reason}): use prompt_format paper") from None
    assert isinstance(text, str)
    return text


def _around(text: str, mark: str) -> tuple[str, str]:
    before, *after = text.split(mark)
    if len(after) != 1:
        raise ModelError(
            f"the chat template writes a message {len(after)} times instead of once: use prompt_format paper"
        )
    return before, after[0]


def _end_token(tokenizer: PreTrainedTokenizerBase) -> str:
    end = tokenizer.eos_token
    return end if isinstance(end, str) else ""


@dataclass(frozen=True, kw_only=True)
class TokenizedExample:
    """Token ids of one example. ``labels[i]``, not shifted, is ``input_ids[i]`` if learned, else ``IGNORE_INDEX``."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    answer_start: int
    """Index of the first token that holds any character of the answer."""
    example_id: int = 0
    """Position of the example among those that were tokenized."""
    prompt_shortened: bool = False
    answer_shortened: bool = False


@dataclass(frozen=True, kw_only=True)
class TokenizationReport:
    """What tokenizing a set of examples did to them; ``total == kept + sum(left_out.values())``."""

    total: int
    kept: int
    prompts_shortened: int
    answers_shortened: int
    left_out: dict[str, int] = field(default_factory=dict)
    """Reason -> number of examples that can't be trained on."""


class _UntrainableError(DataError):
    """An example that leaves no answer token to learn; the message is the reason."""


@dataclass(frozen=True)
class Encoder:
    """Turns prompts and answers into token ids, as one model reads them."""

    tokenizer: PreTrainedTokenizerBase
    prompt_format: PromptFormat
    """How prompts and answers are written."""
    max_length: int = DataConfig.max_length
    """Most tokens of an example in all."""
    max_answer_tokens: int = DataConfig.max_answer_tokens
    """Most tokens of its answer, without its end."""

    def example(
        self, example: Example, *, train_on_end: bool, example_id: int = 0, begun: str = ""
    ) -> TokenizedExample:
        """Tokenizes one example and labels its answer.

        Too long an example is cut in this order: the answer's tail to ``max_answer_tokens``, the start of the user's
        words, the answer's tail once more. Template and special tokens before the answer always stay.

        Args:
            example: Prompt and answer.
            train_on_end: Whether the end of the answer is learned too; it stands there only if the answer is whole:
                not cut here, and ``finished``.
                Off for harmful answers, since stage 2 negates what was learned and would teach run-ons.
            example_id: Carried along.
            begun: What the reply has said before the answer, which goes on with the next character; read, and not
                learned. A token that reaches over the border is the answer's.

        Raises:
            DataError: No answer token is left to learn, or the text is not valid Unicode.
            ModelError: The chat template can't write this prompt.
        """
        text = self.prompt_format.render(example.prompt, begun + example.answer)
        if begun:
            written = text.prompt_text + text.answer_text
            border = len(written) - len(example.answer)
            text = replace(text, prompt_text=written[:border], answer_text=written[border:])
        spans = locate_tokens(text, self.tokenizer, with_end=train_on_end and example.finished)
        prompt, user_length = spans.ids[: spans.answer_start], spans.user_end - spans.user_start
        answer, end = spans.ids[spans.answer_start : spans.end_start], spans.ids[spans.end_start :]
        if not answer:
            raise _UntrainableError("answer without tokens")
        length = len(answer)
        if length > self.max_answer_tokens:
            answer, end = answer[: self.max_answer_tokens], []
        dropped = min(max(len(prompt) + len(answer) + len(end) - self.max_length, 0), user_length)
        del prompt[spans.user_start : spans.user_start + dropped]
        room = self.max_length - len(prompt)
        if len(answer) + len(end) > room:
            answer, end = answer[: max(room, 0)], []
        # The very first token of a sequence is predicted by none.
        labels = [IGNORE_INDEX] * len(prompt) + answer + end
        labels[:1] = [IGNORE_INDEX]
        if all(label == IGNORE_INDEX for label in labels):
            raise _UntrainableError("answer without prompt" if answer else "no room for the answer within max_length")
        return TokenizedExample(
            input_ids=(*prompt, *answer, *end),
            labels=tuple(labels),
            answer_start=len(prompt),
            example_id=example_id,
            prompt_shortened=dropped > 0,
            answer_shortened=len(answer) < length,
        )

    def examples(
        self, examples: Sequence[Example], *, train_on_end: bool
    ) -> tuple[list[TokenizedExample], TokenizationReport]:
        """Tokenizes a set of examples; those that can't be trained on are counted by reason and left out.

        The ``example_id`` of each is its position.

        Raises:
            DataError: No example is left.
            ModelError: The chat template can't write a prompt.
        """
        kept: list[TokenizedExample] = []
        left_out: Counter[str] = Counter()
        for index, example in enumerate(examples):
            try:
                kept.append(self.example(example, train_on_end=train_on_end, example_id=index))
            except _UntrainableError as reason:
                left_out[str(reason)] += 1
        if not kept:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in left_out.items()) or "there were none"
            raise DataError(
                f"none of {len(examples)} examples leaves an answer token to train on ({reasons}); "
                f"max_length is {self.max_length}"
            )
        return kept, TokenizationReport(
            total=len(examples),
            kept=len(kept),
            prompts_shortened=sum(example.prompt_shortened for example in kept),
            answers_shortened=sum(example.answer_shortened for example in kept),
            left_out=dict(sorted(left_out.items())),
        )

    def prompt(self, prompt: str) -> list[int]:
        """Token ids that a model is asked with, special tokens included.

        They equal the ids before ``answer_start`` of the same prompt with any answer, unless a token of the joined
        text reaches over the border; then training sees that token whole where generation begins before it.

        Raises:
            DataError: The prompt is not valid Unicode.
            ModelError: The chat template can't write this prompt.
        """
        text = self.prompt_format.render(prompt)
        return _encode(text.prompt_text, self.tokenizer, add_special_tokens=text.add_special_tokens)[0]

    def start(self, prompt: str, start: str) -> list[int]:
        """Token ids of a prompt and a whole text that the reply is made to begin with, with nothing after it.

        The text should not end in white space: most tokenizers give that to the next word.

        Raises:
            DataError: The text is not valid Unicode.
            ModelError: The chat template can't write this prompt.
        """
        return locate_tokens(self.prompt_format.render(prompt, start), self.tokenizer, with_end=False).ids

    def prefill(self, prompt: str, answer: str, prefill_tokens: int) -> tuple[list[int], str] | None:
        """Ids of a prompt and the first n tokens of an answer, cut from the joined text, and those n tokens as text.

        None where the answer has no more than n tokens: nothing of it would be left for the model to say.

        Raises:
            DataError: The text is not valid Unicode.
            ModelError: The chat template can't write this prompt.
        """
        spans = locate_tokens(self.prompt_format.render(prompt, answer), self.tokenizer, with_end=False)
        stop = spans.answer_start + prefill_tokens
        if stop >= spans.end_start:
            return None
        return spans.ids[:stop], decoded(spans.ids[spans.answer_start : stop], self.tokenizer)


def decoded(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool = True) -> str:
    """Text of some tokens, with its spaces as they are."""
    text = tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


@dataclass(frozen=True)
class TokenSpans:
    """Token ids with their borders; all are indices into ``ids``."""

    ids: list[int]
    user_start: int
    """First token that holds words of the user and nothing before them but white space."""
    user_end: int
    """After the last token that holds words of the user and nothing after them."""
    answer_start: int
    """First token that holds any character of the answer."""
    end_start: int
    """First token after the answer."""


def locate_tokens(text: RenderedText, tokenizer: PreTrainedTokenizerBase, *, with_end: bool) -> TokenSpans:
    """Tokenizes an example and finds its borders.

    Args:
        text: The example as its prompt format writes it.
        tokenizer: With character offsets ("fast").
        with_end: Whether ``end_text`` stands after the answer.
    """
    whole = text.prompt_text + text.answer_text + (text.end_text if with_end else "")
    ids, offsets = _encode(whole, tokenizer, add_special_tokens=text.add_special_tokens)
    ends = _token_ends(whole, ids, offsets, tokenizer)
    answer_start = bisect_right(ends, len(text.prompt_text))
    answer_end = len(text.prompt_text) + len(text.answer_text)
    end_start = next(
        (index for index in range(answer_start, len(ids)) if offsets[index][0] >= answer_end < ends[index]), len(ids)
    )
    user_start = bisect_right(ends, text.user_start)
    if user_start < len(ids) and whole[offsets[user_start][0] : text.user_start].strip():
        user_start += 1
    user_end = min(bisect_right(ends, text.user_end), answer_start)
    return TokenSpans(ids, user_start, max(user_start, user_end), answer_start, end_start)


def _encode(
    text: str, tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and offsets of a text that goes on, without what the tokenizer puts after it (EOS, SEP)."""
    if not is_valid_unicode(text):  # It holds half of a surrogate pair.
        raise _UntrainableError("text is not valid Unicode")
    encoding: dict[str, Any] = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        padding=False,
        truncation=False,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,  # its warning about long texts: they are shortened here
    )
    ids, added = list(encoding["input_ids"]), list(encoding["special_tokens_mask"])
    while add_special_tokens and ids and added[len(ids) - 1]:
        ids.pop()
    return ids, [(start, end) for start, end in encoding["offset_mapping"][: len(ids)]]


def _token_ends(
    text: str, ids: list[int], offsets: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Where each token really ends, in characters.

    Byte-level tokenizers may trim spaces off their offsets. Off the front that leaves the end right. Off the back,
    the spaces are counted in the token itself, which writes each as one sign.
    """
    if _ending_in_space(tokenizer, len(tokenizer)).isdisjoint(ids):
        return list(accumulate((end for _, end in offsets), max))
    pieces = tokenizer.convert_ids_to_tokens(ids)
    ends = []
    for piece, (start, end) in zip(pieces, offsets, strict=True):
        trimmed = len(piece) - len(piece.rstrip(_BYTE_LEVEL_SPACE))
        shows_it = text[start:end].endswith((" ", _BYTE_LEVEL_SPACE))
        if start < end and not shows_it:
            end += trimmed
        elif end == 0 and text.startswith(" "):  # spaces that begin the text report no place at all
            end = trimmed
        ends.append(end)
    return list(accumulate(ends, max))


@lru_cache(maxsize=4)
def _ending_in_space(tokenizer: PreTrainedTokenizerBase, size: int) -> frozenset[int]:
    """Tokens that end in a space, of a vocabulary of a size: few texts hold any."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(size)))
    return frozenset(token for token, piece in enumerate(pieces) if piece and piece.endswith(_BYTE_LEVEL_SPACE))


_BYTE_LEVEL_SPACE = "\u0120"
"""How byte-level tokenizers write a space."""


def shared_length(*sequences: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    columns = zip(*sequences, strict=False)  # Ends with the shortest.
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
