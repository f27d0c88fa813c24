"""What normal text says of a changed model, by which settings such as alpha are chosen: test splits stay unread.

The normal sets are ``retain_validation`` and one half of each set of ``data.normal`` that has answers,
``normal_validation:NAME``: prompts that no method trains on, and rows that no table reports.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from sku.config import SweepConfig
from sku.data.examples import ForgetRetainData
from sku.data.tokens import TokenizedExample
from sku.errors import EvaluationError
from sku.evaluate import batching
from sku.evaluate.asking import Writer, draw_examples
from sku.evaluate.metrics import MAX_EXPONENT
from sku.evaluate.perplexity import ScoredText, compare_distributions, score_examples
from sku.evaluate.records import Split
from sku.evaluate.utility_cost import RETAIN, UtilityCost, utility_cost

Scores = Sequence[tuple[float, int]]
"""Of each answer: the sum of its tokens' losses in nats, and their number."""


def validation_texts(
    data: ForgetRetainData, writer: Writer, count: int, *, seed: int
) -> dict[Split, list[TokenizedExample]]:
    """Answers of the normal sets as they are scored.

    Args:
        data: The splits.
        writer: Of the model.
        count: Most examples of each set, drawn by the seed.
        seed: Of the draw.

    Returns:
        Split -> token ids with the answers and their ends labelled; those without a token are left out, and so is
        another normal set without any.

    Raises:
        EvaluationError: None of ``retain_validation`` is left.
    """
    found: dict[Split, list[TokenizedExample]] = {}
    others = {f"normal_validation:{name}": examples for name, examples in data.normal_validation.items()}
    for split, examples in {RETAIN: data.retain_validation, **others}.items():
        drawn = draw_examples(examples, count, seed=seed)
        scored = (writer.scored(example.prompt, example.answer, with_end=example.finished) for example in drawn)
        texts = [example for example in scored if example is not None]
        if texts:
            found[split] = texts
    if RETAIN not in found:
        raise EvaluationError("retain_validation holds no usable example: give more normal pairs (data.retain)")
    return found


class NormalText:
    """Answers of the normal sets, and how the base model scores them."""

    def __init__(
        self, base: PreTrainedModel, texts: Mapping[Split, Sequence[TokenizedExample]], *, batch_size: int
    ) -> None:
        """Scores the answers under the base model.

        Args:
            base: The original model; it must stay as it is.
            texts: From ``validation_texts``.
            batch_size: Answers at once.

        Raises:
            EvaluationError: A loss is not finite.
        """
        self.base, self.texts, self.batch_size = base, texts, batch_size
        self.base_scores = self.scores(base)

    def scores(self, model: PreTrainedModel) -> dict[Split, Scores]:
        """Loss of each answer, with dropout off.

        Raises:
            EvaluationError: As ``score_examples``.
        """
        with batching.evaluation_mode(model):
            return {
                split: score_examples(model, texts, batch_size=self.batch_size) for split, texts in self.texts.items()
            }

    def perplexity(self, scores: Mapping[Split, Scores]) -> dict[str, float]:
        """Perplexity of each set, as a multiple of the base model's."""
        return {
            split: perplexity_ratio(_mean_loss(own), _mean_loss(self.base_scores[split]))
            for split, own in scores.items()
        }

    def kl(self, model: PreTrainedModel) -> dict[str, float]:
        """KL(P || Q) on each set, P the base model, nats a token.

        Raises:
            EvaluationError: As ``compare_distributions``.
        """
        found: dict[str, float] = {}
        with batching.evaluation_mode(model), batching.evaluation_mode(self.base):
            for split, texts in self.texts.items():
                named = [ScoredText(id=str(place), split=split, tokens=text) for place, text in enumerate(texts)]
                rows = compare_distributions(self.base, model, named, batch_size=self.batch_size)
                found[split] = math.fsum(row.kl for row in rows) / sum(row.tokens for row in rows)
        return found

    def cost(self, model: PreTrainedModel, limits: SweepConfig) -> UtilityCost:
        """Of perplexity and KL, without any reply; KL is not looked at where the perplexity is beyond already.

        Raises:
            EvaluationError: A loss or a divergence is not finite.
        """
        perplexity = self.perplexity(self.scores(model))
        found = utility_cost(limits, perplexity=perplexity, kl={})
        return utility_cost(limits, perplexity=perplexity, kl=self.kl(model)) if found.within else found


def _mean_loss(scores: Scores) -> float:
    """Mean over all tokens, nats per token."""
    return math.fsum(nll for nll, _ in scores) / sum(tokens for _, tokens in scores)


def perplexity_ratio(loss: float, base_loss: float) -> float:
    """``exp(loss - base_loss)`` of two mean losses, finite and above 0."""
    return math.exp(max(min(loss - base_loss, MAX_EXPONENT), -MAX_EXPONENT))
