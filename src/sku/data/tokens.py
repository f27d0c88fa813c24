"""From examples to token ids and labels: only the answer is learned, and all of it.

The whole text is tokenized at once, as the model will meet it, and each token is then placed by the characters it
holds. Tokenizing the parts apart would cut words differently: a prompt that ends in a space, joined to an answer,
gives one token that neither part has.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from sku.config import DataConfig
from sku.data.examples import Example, is_valid_unicode
from sku.data.prompts import PromptFormat, RenderedText
from sku.errors import DataError

IGNORE_INDEX = -100
"""Label of a token that is not trained on."""


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
            begun: What the reply has said before the answer, from which a space divides it; read, and not learned.

        Returns:
            The tokens.

        Raises:
            DataError: No answer token is left to learn, or the text is not valid Unicode.
            ModelError: The chat template can't write this prompt.
        """
        text = self.prompt_format.render(example.prompt, begun or example.answer)
        if begun:
            text = replace(text, prompt_text=text.prompt_text + text.answer_text, answer_text=f" {example.answer}")
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
            reason = "no room for the answer within max_length" if not answer else "answer without prompt"
            raise _UntrainableError(reason)
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

        Args:
            examples: In order; ``example_id`` is the position here.
            train_on_end: Whether the end of a whole answer is learned too.

        Returns:
            The tokenized examples, and the account.

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
        return encode(text.prompt_text, self.tokenizer, add_special_tokens=text.add_special_tokens)

    def start(self, prompt: str, start: str) -> list[int]:
        """Token ids of a prompt and a whole text that the reply is made to begin with, with nothing after it.

        Args:
            prompt: The user's words.
            start: First words of the reply, without white space at its end: most tokenizers give that to the next
                word.

        Raises:
            DataError: The text is not valid Unicode.
            ModelError: The chat template can't write this prompt.
        """
        return locate_tokens(self.prompt_format.render(prompt, start), self.tokenizer, with_end=False).ids

    def prefill(self, prompt: str, answer: str, prefill_tokens: int) -> tuple[list[int], str] | None:
        """Token ids of a prompt and the first tokens of an answer, for a reply that must begin with them.

        Args:
            prompt: The user's words.
            answer: Answer that the reply begins with.
            prefill_tokens: n, how many tokens of the answer are given.

        Returns:
            Ids of the prompt and n answer tokens, cut from the joined text, and those n tokens as text. None where the
            answer has no more than n tokens: nothing of it would be left for the model to say.

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


def encode(text: str, tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool) -> list[int]:
    """Token ids of a text that goes on: special tokens that the tokenizer puts after it (EOS, SEP) are left off."""
    return _encode(text, tokenizer, add_special_tokens=add_special_tokens)[0]


def locate_tokens(text: RenderedText, tokenizer: PreTrainedTokenizerBase, *, with_end: bool) -> TokenSpans:
    """Tokenizes an example and finds its borders.

    Args:
        text: The example as its prompt format writes it.
        tokenizer: With character offsets ("fast") the borders are exact. Without, the answer starts where the tokens
            of the whole part from those of the prompt alone.
        with_end: Whether ``end_text`` stands after the answer.

    Returns:
        Ids and borders.
    """
    whole = text.prompt_text + text.answer_text + (text.end_text if with_end else "")
    ids, offsets = _encode(whole, tokenizer, add_special_tokens=text.add_special_tokens)
    if offsets is None:
        return _compare_tokens(ids, text, tokenizer, with_end=with_end)
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
) -> tuple[list[int], list[tuple[int, int]] | None]:
    if not is_valid_unicode(text):  # It holds half of a surrogate pair.
        raise _UntrainableError("text is not valid Unicode")
    encoding: dict[str, Any] = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        padding=False,
        truncation=False,
        return_offsets_mapping=tokenizer.is_fast,
        return_special_tokens_mask=True,
        verbose=False,  # its warning about long texts: they are shortened here
    )
    ids, added = list(encoding["input_ids"]), list(encoding["special_tokens_mask"])
    while add_special_tokens and ids and added[len(ids) - 1]:
        ids.pop()
    offsets = [(start, end) for start, end in encoding["offset_mapping"][: len(ids)]] if tokenizer.is_fast else None
    return ids, offsets


def _token_ends(
    text: str, ids: list[int], offsets: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Where each token really ends, in characters.

    Byte-level tokenizers may trim spaces off their offsets. Off the front that leaves the end right. Off the back,
    the spaces are counted in the token itself, which writes each as one sign.
    """
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


_BYTE_LEVEL_SPACE = "\u0120"
"""How byte-level tokenizers write a space."""


def _compare_tokens(
    ids: list[int], text: RenderedText, tokenizer: PreTrainedTokenizerBase, *, with_end: bool
) -> TokenSpans:
    def tokens_shared_with(part: str) -> int:
        return shared_length(ids, encode(part, tokenizer, add_special_tokens=text.add_special_tokens))

    answer_start = tokens_shared_with(text.prompt_text)
    end_start = tokens_shared_with(text.prompt_text + text.answer_text) if with_end else len(ids)
    user_start = min(tokens_shared_with(text.prompt_text[: text.user_start]), answer_start)
    after = encode(text.prompt_text[text.user_end :], tokenizer, add_special_tokens=False)
    user_end = answer_start - shared_length(ids[:answer_start][::-1], after[::-1])
    return TokenSpans(ids, user_start, max(user_start, user_end), answer_start, max(answer_start, end_start))


def shared_length(*sequences: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    columns = zip(*sequences, strict=False)  # Ends with the shortest.
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
