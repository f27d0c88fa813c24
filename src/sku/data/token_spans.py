"""Where the tokens of a rendered example belong: to the template, the user's words, the answer or its end.

The whole text is tokenized at once, as the model will meet it, and each token is then placed by the characters it
holds. Tokenizing the parts apart would cut words differently: a prompt that ends in a space, joined to an answer,
gives one token that neither part has.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from sku.data.prompts import RenderedText


@dataclass(frozen=True)
class TokenSpans:
    """Token ids with their borders; all are indices into ``ids``."""

    ids: list[int]
    user_start: int
    """First token that holds words of the user and nothing before them but white space."""
    user_end: int
    """Behind the last token that holds words of the user and nothing behind them."""
    answer_start: int
    """First token that holds any character of the answer."""
    end_start: int
    """First token behind the answer."""


def encode(text: str, tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool) -> list[int]:
    """Token ids of a text that goes on: special tokens that the tokenizer puts behind it (EOS, SEP) are left off."""
    return _encode(text, tokenizer, add_special_tokens=add_special_tokens)[0]


def locate_tokens(text: RenderedText, tokenizer: PreTrainedTokenizerBase, *, with_end: bool) -> TokenSpans:
    """Tokenizes an example and finds its borders.

    Args:
        text: The example as its prompt format writes it.
        tokenizer: With character offsets ("fast") the borders are exact. Without, the answer starts where the tokens
            of the whole part from those of the prompt alone.
        with_end: Whether ``end_text`` stands behind the answer.

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
        return _shared_length(ids, encode(part, tokenizer, add_special_tokens=text.add_special_tokens))

    answer_start = tokens_shared_with(text.prompt_text)
    end_start = tokens_shared_with(text.prompt_text + text.answer_text) if with_end else len(ids)
    user_start = min(tokens_shared_with(text.prompt_text[: text.user_start]), answer_start)
    after = encode(text.prompt_text[text.user_end :], tokenizer, add_special_tokens=False)
    user_end = answer_start - _shared_length(ids[:answer_start][::-1], after[::-1])
    return TokenSpans(ids, user_start, max(user_start, user_end), answer_start, max(answer_start, end_start))


def _shared_length(left: list[int], right: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
