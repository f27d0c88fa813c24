"""From examples to token ids and labels: only the answer is learned, and all of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from sku.data.examples import Example
from sku.data.prompts import PromptFormat
from sku.data.rows import is_valid_unicode
from sku.data.token_spans import encode, locate_tokens
from sku.errors import DataError
from sku.losses import IGNORE_INDEX


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


def tokenize_example(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    *,
    max_length: int,
    max_answer_tokens: int,
    train_on_end: bool,
    example_id: int = 0,
    begun: str = "",
) -> TokenizedExample:
    """Tokenizes one example and labels its answer.

    Too long an example is cut in this order: the answer's tail to ``max_answer_tokens``, the start of the user's
    words, the answer's tail once more. Template and special tokens before the answer always stay.

    Args:
        example: Prompt and answer.
        tokenizer: Of the model.
        prompt_format: How both are written.
        max_length: Most tokens in all.
        max_answer_tokens: Most tokens of the answer, without its end.
        train_on_end: Whether the end of the answer is learned too; it stands there only if the answer is whole: not
            cut here, and ``finished``.
            Off for harmful answers, since stage 2 negates what was learned and would teach run-ons.
        example_id: Carried along.
        begun: What the reply has said before the answer, from which a space divides it; read, and not learned.

    Returns:
        The tokens.

    Raises:
        DataError: No answer token is left to learn, or the text is not valid Unicode.
        ModelError: The chat template can't write this prompt.
    """
    if not is_valid_unicode(example.prompt) or not is_valid_unicode(example.answer):
        raise _UntrainableError("text is not valid Unicode")
    text = prompt_format.render(example.prompt, begun or example.answer)
    if begun:
        text = replace(text, prompt_text=text.prompt_text + text.answer_text, answer_text=f" {example.answer}")
    spans = locate_tokens(text, tokenizer, with_end=train_on_end and example.finished)
    prompt, user_length = spans.ids[: spans.answer_start], spans.user_end - spans.user_start
    answer, end = spans.ids[spans.answer_start : spans.end_start], spans.ids[spans.end_start :]
    if not answer:
        raise _UntrainableError("answer without tokens")
    length = len(answer)
    if length > max_answer_tokens:
        answer, end = answer[:max_answer_tokens], []
    dropped = min(max(len(prompt) + len(answer) + len(end) - max_length, 0), user_length)
    del prompt[spans.user_start : spans.user_start + dropped]
    room = max_length - len(prompt)
    if len(answer) + len(end) > room:
        answer, end = answer[: max(room, 0)], []
    # The very first token of a sequence is predicted by none.
    labels = [IGNORE_INDEX] * len(prompt) + answer + end
    labels[:1] = [IGNORE_INDEX]
    if all(label == IGNORE_INDEX for label in labels):
        raise _UntrainableError("no room for the answer within max_length" if not answer else "answer without prompt")
    return TokenizedExample(
        input_ids=(*prompt, *answer, *end),
        labels=tuple(labels),
        answer_start=len(prompt),
        example_id=example_id,
        prompt_shortened=dropped > 0,
        answer_shortened=len(answer) < length,
    )


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    *,
    max_length: int,
    max_answer_tokens: int,
    train_on_end: bool,
) -> tuple[list[TokenizedExample], TokenizationReport]:
    """Tokenizes a set of examples; those that can't be trained on are counted by reason and left out.

    Args:
        examples: In order; ``example_id`` is the position here.
        tokenizer: Of the model.
        prompt_format: How prompts and answers are written.
        max_length: Most tokens in all.
        max_answer_tokens: Most tokens of an answer, without its end.
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
            kept.append(
                tokenize_example(
                    example,
                    tokenizer,
                    prompt_format,
                    max_length=max_length,
                    max_answer_tokens=max_answer_tokens,
                    train_on_end=train_on_end,
                    example_id=index,
                )
            )
        except _UntrainableError as reason:
            left_out[str(reason)] += 1
    if not kept:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in left_out.items()) or "there were none"
        raise DataError(
            f"none of {len(examples)} examples leaves an answer token to train on ({reasons}); "
            f"max_length is {max_length}"
        )
    return kept, TokenizationReport(
        total=len(examples),
        kept=len(kept),
        prompts_shortened=sum(example.prompt_shortened for example in kept),
        answers_shortened=sum(example.answer_shortened for example in kept),
        left_out=dict(sorted(left_out.items())),
    )


def tokenize_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat) -> list[int]:
    """Token ids that a model is asked with.

    They equal the ids before ``answer_start`` of the same prompt with any answer, unless a token of the joined text
    reaches over the border; then training sees that token whole where generation begins before it.

    Args:
        prompt: The user's words.
        tokenizer: Of the model.
        prompt_format: How the prompt is written.

    Returns:
        Ids, special tokens included.

    Raises:
        DataError: The prompt is not valid Unicode.
        ModelError: The chat template can't write this prompt.
    """
    if not is_valid_unicode(prompt):
        raise DataError("a prompt is not valid Unicode (it holds half of a surrogate pair)")
    text = prompt_format.render(prompt)
    return encode(text.prompt_text, tokenizer, add_special_tokens=text.add_special_tokens)


def tokenize_prefill(
    prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat, prefill_tokens: int
) -> tuple[list[int], str] | None:
    """Token ids of a prompt and the first tokens of an answer, for a reply that is forced to begin with them.

    Args:
        prompt: The user's words.
        answer: Answer that the reply begins with.
        tokenizer: Of the model.
        prompt_format: How both are written.
        prefill_tokens: n, how many tokens of the answer are given.

    Returns:
        Ids of the prompt and n answer tokens, cut from the joined text, and those n tokens as text. None where the
        answer has no more than n tokens: nothing of it would be left for the model to say.

    Raises:
        DataError: The text is not valid Unicode.
        ModelError: The chat template can't write this prompt.
    """
    if not is_valid_unicode(prompt) or not is_valid_unicode(answer):
        raise DataError("a prompt or answer is not valid Unicode (it holds half of a surrogate pair)")
    spans = locate_tokens(prompt_format.render(prompt, answer), tokenizer, with_end=False)
    stop = spans.answer_start + prefill_tokens
    if stop >= spans.end_start:
        return None
    forced = tokenizer.decode(
        spans.ids[spans.answer_start : stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert isinstance(forced, str)
    return spans.ids[:stop], forced


def tokenize_start(
    prompt: str, start: str, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat
) -> list[int]:
    """Token ids of a prompt and a whole text that the reply is made to begin with.

    Args:
        prompt: The user's words.
        start: First words of the reply, without white space at its end: most tokenizers give that to the next word.
        tokenizer: Of the model.
        prompt_format: How both are written.

    Returns:
        Ids, special tokens included, with nothing after the start.

    Raises:
        DataError: The text is not valid Unicode.
        ModelError: The chat template can't write this prompt.
    """
    if not is_valid_unicode(prompt) or not is_valid_unicode(start):
        raise DataError("a prompt or the start of a reply is not valid Unicode (it holds half of a surrogate pair)")
    return locate_tokens(prompt_format.render(prompt, start), tokenizer, with_end=False).ids
