"""What a run would train on, described before it trains: counts, lengths, and examples token by token."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sku.data.examples import Example, ForgetExample, ForgetRetainData, group_of, has_answers, prompts_of
from sku.data.splits import near_to
from sku.data.tokens import IGNORE_INDEX, Encoder, TokenizedExample, decoded

PERCENTILES = (50, 90, 100)
VIEWS = 3
"""Examples shown token by token, of ``forget_train`` and of ``retain_train`` each."""


def describe_data(data: ForgetRetainData, encoder: Encoder, *, show_harmful: bool = False) -> dict[str, Any]:
    """Tokenizes every split as a run does and describes the outcome, as ``sku data inspect --json`` prints it.

    Args:
        data: All splits.
        encoder: Of the model.
        show_harmful: Show harmful answers; they are replaced by their length and hash otherwise.

    Raises:
        DataError: A split leaves nothing to train on.
        ModelError: The chat template can't write a prompt.
    """
    splits: dict[str, dict[str, Any]] = {}
    views: list[dict[str, Any]] = []
    asked = {name: len(found) for name, found in data.splits().items() if found and not has_answers(found)}
    for name, examples in data.splits().items():
        if not examples or name in asked:
            continue
        # As in training: negating a learned end would teach run-ons.
        tokenized, report = encoder.examples(examples, train_on_end=not isinstance(examples[0], ForgetExample))
        splits[name] = {
            "examples": len(examples),
            "groups": len({group_of(example) for example in examples}),
            "categories": dict(sorted(Counter(example.category or "" for example in examples).items())),
            "unfinished": sum(not example.finished for example in examples),
            "length_percentiles": _percentiles([len(row.input_ids) for row in tokenized]),
            "learned_percentiles": _percentiles(
                [len(row.labels) - row.labels.count(IGNORE_INDEX) for row in tokenized]
            ),
            "tokenization": asdict(report),
        }
        if name in ("forget_train", "retain_train"):
            views += [
                {"split": name, "category": example.category, "tokens": tokens}
                for row in tokenized[:VIEWS]
                for example in [examples[row.example_id]]
                for tokens in [_tokens(example, row, encoder.tokenizer, show_harmful=show_harmful)]
            ]
    notes = [*data.notes(), *(f"{name}: {count} prompts without answers, only asked" for name, count in asked.items())]
    # Families that are too large to stay together leave near copies on both sides; so has a split of the world.
    near = near_to(*(tuple(sorted(prompts_of(found))) for found in (data.forget_test, data.forget_train)))
    if any(near):
        notes.append(f"forget_test: {sum(near)} of {len(near)} prompts are a near copy of one that is trained on")
    return {
        "prompt_format": encoder.prompt_format.name,
        "max_length": encoder.max_length,
        "max_answer_tokens": encoder.max_answer_tokens,
        "splits": splits,
        "provenance": [asdict(source) for source in data.provenance],
        "views": views,
        "notes": notes,
    }


def hidden_text(text: str) -> str:
    """What stands for a harmful text: enough to recognise it again, nothing to learn from it."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"[hidden, {len(text.split())} words, sha256 {digest[:8]}]"


def _percentiles(counts: Sequence[int]) -> dict[int, int]:
    """Nearest-rank percentiles, so that each is a length that occurs."""
    return {rank: int(np.percentile(counts, rank, method="inverted_cdf")) for rank in PERCENTILES}


def _tokens(
    example: Example, row: TokenizedExample, tokenizer: PreTrainedTokenizerBase, *, show_harmful: bool
) -> list[dict[str, Any]]:
    """Text of each token in its place (alone, a token of a SentencePiece model loses its space), or of hidden ones."""
    hides = isinstance(example, ForgetExample) and not show_harmful
    shown = row.answer_start if hides else len(row.input_ids)
    tokens: list[dict[str, Any]] = []
    before = ""
    for index, token_id in enumerate(row.input_ids[:shown]):
        text = decoded(row.input_ids[: index + 1], tokenizer, skip_special_tokens=False)
        piece = text.removeprefix(before)
        if not text.startswith(before):
            piece = decoded([token_id], tokenizer, skip_special_tokens=False)
        tokens.append({"text": piece, "learned": row.labels[index] != IGNORE_INDEX, "tokens": 1})
        before = text
    if hides:
        count = len(row.input_ids) - shown
        tokens.append({"text": hidden_text(example.answer), "learned": True, "tokens": count})
    return tokens
