"""The loss of ``retain_validation``, by which settings such as alpha are chosen: the test split stays unread."""

from __future__ import annotations

import math
from collections.abc import Sequence

from transformers import PreTrainedModel

from sku.data.examples import ForgetRetainData
from sku.data.tokenization import TokenizedExample
from sku.errors import EvaluationError
from sku.evaluate import batching
from sku.evaluate.asking import Writer
from sku.evaluate.metrics import MAX_EXPONENT
from sku.evaluate.perplexity import score_examples
from sku.evaluate.sampling import draw_examples

Scores = Sequence[tuple[float, int]]
"""Of each answer: the sum of its tokens' losses in nats, and their number."""


def validation_texts(data: ForgetRetainData, writer: Writer, count: int, *, seed: int) -> list[TokenizedExample]:
    """Answers of ``retain_validation`` as they are scored.

    Args:
        data: The splits.
        writer: Of the model.
        count: Most examples, drawn by the seed.
        seed: Of the draw.

    Returns:
        Token ids with the answers and their ends labelled; those without a token are left out.

    Raises:
        EvaluationError: None is left.
    """
    drawn = draw_examples(data.retain_validation, count, seed=seed)
    scored = (writer.scored(example.prompt, example.answer, with_end=example.finished) for example in drawn)
    texts = [example for example in scored if example is not None]
    if not texts:
        raise EvaluationError("retain_validation holds no usable example: raise data.retain_validation_fraction")
    return texts


def score_texts(model: PreTrainedModel, texts: Sequence[TokenizedExample], *, batch_size: int) -> Scores:
    """Loss of each text, with dropout off.

    Raises:
        EvaluationError: As ``score_examples``.
    """
    with batching.evaluation_mode(model):
        return score_examples(model, texts, batch_size=batch_size)


def mean_loss(scores: Scores) -> float:
    """Mean over all tokens, nats per token."""
    return math.fsum(nll for nll, _ in scores) / sum(tokens for _, tokens in scores)


def perplexity_ratio(loss: float, base_loss: float) -> float:
    """``exp(loss - base_loss)`` of two mean losses, finite."""
    return math.exp(min(loss - base_loss, MAX_EXPONENT))
