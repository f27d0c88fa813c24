"""What a run would train on, described before it trains: counts, lengths, and examples token by token."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from sku.data.examples import (
    Example,
    ForgetExample,
    ForgetRetainData,
    Provenance,
    group_of,
    has_answers,
    normalise_prompt,
)
from sku.data.near_copies import count_near_copies, near_to
from sku.data.tokens import IGNORE_INDEX, Encoder, TokenizationReport, TokenizedExample, decoded

PERCENTILES = (50, 90, 99, 100)


@dataclass(frozen=True, kw_only=True)
class TokenView:
    """One token, or a stretch of hidden ones."""

    text: str
    learned: bool
    tokens: int = 1
    """How many tokens this stands for."""


@dataclass(frozen=True, kw_only=True)
class ExampleView:
    """One example as the model meets it."""

    split: str
    category: str | None
    tokens: tuple[TokenView, ...]


@dataclass(frozen=True, kw_only=True)
class SplitDescription:
    """One split after tokenization."""

    examples: int
    groups: int
    near_copies: int
    """Prompts with a near copy among the others of the split."""
    categories: dict[str, int]
    """Category -> number of examples; ``""`` where an example has none."""
    unfinished: int
    """Examples whose answer was cut off, as their row says: it teaches no end."""
    length_percentiles: dict[int, int]
    """Percentile -> tokens of the whole sequence."""
    learned_percentiles: dict[int, int]
    """Percentile -> tokens that are learned."""
    tokenization: TokenizationReport


@dataclass(frozen=True, kw_only=True)
class DataDescription:
    """All that ``sku data inspect`` shows."""

    prompt_format: str
    max_length: int
    max_answer_tokens: int
    splits: dict[str, SplitDescription]
    provenance: tuple[Provenance, ...]
    """With the rows left out of each source, by reason."""
    views: tuple[ExampleView, ...]
    notes: tuple[str, ...] = ()
    """Of ``ForgetRetainData.notes``: what a reader of any figure on these splits needs."""


def describe_data(
    data: ForgetRetainData, encoder: Encoder, *, show_harmful: bool = False, views_per_kind: int = 3
) -> DataDescription:
    """Tokenizes every split as a run does and describes the outcome.

    Args:
        data: All splits.
        encoder: Of the model.
        show_harmful: Show harmful answers; they are replaced by their length and hash otherwise.
        views_per_kind: Examples shown token by token, of ``forget_train`` and of ``retain_train`` each.

    Returns:
        The description.

    Raises:
        DataError: A split leaves nothing to train on.
        ModelError: The chat template can't write a prompt.
    """
    splits: dict[str, SplitDescription] = {}
    views: list[ExampleView] = []
    asked = {name: len(found) for name, found in data.splits().items() if found and not has_answers(found)}
    for name, examples in data.splits().items():
        if not examples or name in asked:
            continue
        # As in training: negating a learned end would teach run-ons.
        tokenized, report = encoder.examples(examples, train_on_end=not isinstance(examples[0], ForgetExample))
        splits[name] = SplitDescription(
            examples=len(examples),
            groups=len({group_of(example) for example in examples}),
            near_copies=count_near_copies(_different(examples)),
            categories=dict(sorted(Counter(example.category or "" for example in examples).items())),
            unfinished=sum(not example.finished for example in examples),
            length_percentiles=_percentiles([len(row.input_ids) for row in tokenized]),
            learned_percentiles=_percentiles([len(row.labels) - row.labels.count(IGNORE_INDEX) for row in tokenized]),
            tokenization=report,
        )
        if name in ("forget_train", "retain_train"):
            views += [
                _view(name, examples[row.example_id], row, encoder.tokenizer, show_harmful=show_harmful)
                for row in tokenized[:views_per_kind]
            ]
    return DataDescription(
        prompt_format=encoder.prompt_format.name,
        max_length=encoder.max_length,
        max_answer_tokens=encoder.max_answer_tokens,
        splits=splits,
        provenance=data.provenance,
        views=tuple(views),
        notes=(
            *data.notes(),
            *_near_to_training(data),
            *(f"{name}: {count} prompts without answers, only asked" for name, count in asked.items()),
        ),
    )


def _different(examples: Sequence[Example]) -> list[str]:
    return sorted({normalise_prompt(example.prompt) for example in examples})


def _near_to_training(data: ForgetRetainData) -> Iterator[str]:
    """Families that are too large to stay together leave near copies on both sides; so has a split of the world."""
    near = near_to(_different(data.forget_test), _different(data.forget_train))
    if any(near):
        yield f"forget_test: {sum(near)} of {len(near)} prompts are a near copy of one that is trained on"


def hidden_text(text: str) -> str:
    """What stands for a harmful text: enough to recognise it again, nothing to learn from it."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"[hidden, {len(text.split())} words, sha256 {digest[:8]}]"


def _percentiles(counts: Sequence[int]) -> dict[int, int]:
    """Nearest-rank percentiles, so that each is a length that occurs."""
    return {rank: int(np.percentile(counts, rank, method="inverted_cdf")) for rank in PERCENTILES}


def _view(
    split: str, example: Example, row: TokenizedExample, tokenizer: PreTrainedTokenizerBase, *, show_harmful: bool
) -> ExampleView:
    hides = isinstance(example, ForgetExample) and not show_harmful
    shown = row.answer_start if hides else len(row.input_ids)
    pieces = _pieces(row.input_ids[:shown], tokenizer)
    tokens = [
        TokenView(text=piece, learned=label != IGNORE_INDEX)
        for piece, label in zip(pieces, row.labels[:shown], strict=True)
    ]
    if hides:
        tokens.append(TokenView(text=hidden_text(example.answer), learned=True, tokens=len(row.input_ids) - shown))
    return ExampleView(split=split, category=example.category, tokens=tuple(tokens))


def _pieces(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Text of each token in its place: alone, a token of a SentencePiece model loses its space."""
    pieces: list[str] = []
    before = ""
    for index, token_id in enumerate(ids):
        text = decoded(ids[: index + 1], tokenizer, skip_special_tokens=False)
        alone = not text.startswith(before)
        pieces.append(decoded([token_id], tokenizer, skip_special_tokens=False) if alone else text[len(before) :])
        before = text
    return pieces
