"""Prompt and reply as token ids for a judge's model: inside its template both are data, whatever they contain.

A reply that holds the judge's own turn markers could end its turn and speak for the judge. So each marker in prompt or
reply gets a space behind its first character before anything is encoded, which leaves every other text exactly as the
model's card would encode it. Then the control tokens of the whole are counted: a text that still adds one (a tokenizer
may rewrite characters first) is not judged.
"""

from __future__ import annotations

import bisect
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

PROMPT, REPLY = "@@sku-prompt@@", "@@sku-reply@@"
"""Stand in for prompt and reply while a template is rendered."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One conversation as a model reads it."""

    ids: tuple[int, ...]
    type_ids: tuple[int, ...] | None = None
    """Which text of a pair each token belongs to, for models that ask for it."""
    kept: int
    """Characters of the reply that fitted, counted as they are encoded."""
    length: int
    """All its characters, counted so."""


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """A conversation that the model can't be asked about."""

    reason: str


class ConversationEncoder:
    """Encodes prompt and reply inside one fixed text, or as a pair of texts."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text: str | None,
        *,
        markers: Iterable[str] = (),
        add_special_tokens: bool,
        max_length: int,
    ) -> None:
        """Measures the fixed text.

        Args:
            tokenizer: Of the model.
            text: With ``PROMPT`` and ``REPLY`` where prompt and reply belong; None for a pair of texts.
            markers: Plain text that means something to the model, beside the tokenizer's special tokens.
            add_special_tokens: Whether the tokenizer adds its own at the ends; a rendered chat template has them.
            max_length: Most tokens.
        """
        self._tokenizer, self._max_length, self._add_special_tokens = tokenizer, max_length, add_special_tokens
        self._pieces = None if text is None else re.split(f"({PROMPT}|{REPLY})", text)
        special = {str(token) for token in tokenizer.all_special_tokens}
        special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        vocabulary = tokenizer.get_vocab()
        self._control_ids = {vocabulary[token] for token in special}
        self._control_ids -= {tokenizer.unk_token_id}
        self._markers = _pattern({*special, *markers})
        self._expected = self._controls(self._encode("x", "x")[0])

    def encode(self, prompt: str, reply: str) -> Encoded | Unreadable:
        """Encodes one conversation; a reply that is too long loses its end.

        Args:
            prompt: What the evaluated model was asked.
            reply: What it said.

        Returns:
            The token ids, or why there are none.
        """
        prompt, reply = (self._markers(text.strip()) for text in (prompt, reply))
        kept = len(reply)
        ids, type_ids = self._encode(prompt, reply)
        if len(ids) > self._max_length:
            kept = self._longest(lambda length: len(self._encode(prompt, reply[:length])[0]), len(reply))
            if kept < 1:
                return Unreadable(reason=f"the prompt leaves no room for a reply in {self._max_length} tokens")
            ids, type_ids = self._encode(prompt, reply[:kept])
        if self._controls(ids) != self._expected:
            return Unreadable(reason="prompt or reply can't be kept apart from the model's control tokens")
        return Encoded(ids=ids, type_ids=type_ids, kept=kept, length=len(reply))

    def _longest(self, tokens_of: Callable[[int], int], length: int) -> int:
        return bisect.bisect_right(range(length + 1), self._max_length, key=tokens_of) - 1

    def _encode(self, prompt: str, reply: str) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        texts: tuple[str, ...] = (prompt, reply)
        if self._pieces is not None:
            texts = ("".join({PROMPT: prompt, REPLY: reply}.get(piece, piece) for piece in self._pieces),)
        found: Any = self._tokenizer(*texts, add_special_tokens=self._add_special_tokens, verbose=False)
        type_ids = found.get("token_type_ids")
        return tuple(found["input_ids"]), None if type_ids is None else tuple(type_ids)

    def _controls(self, ids: Iterable[int]) -> Counter[int]:
        return Counter(token for token in ids if token in self._control_ids)


def _pattern(markers: set[str]) -> Callable[[str], str]:
    """What puts a space into every marker of a text."""
    longest_first = sorted((marker for marker in markers if len(marker.strip()) > 1), key=len, reverse=True)
    if not longest_first:
        return lambda text: text
    pattern = re.compile("|".join(map(re.escape, longest_first)))
    return lambda text: pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
