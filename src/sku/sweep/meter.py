"""Measures one alpha after the other, on one model in memory that is written anew from the original each time.

Two models are held, the original and the one that is written; no file is. The weights at an alpha are those of
``negate`` at that alpha, bit for bit, whatever was measured before.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sku.config import EvaluateConfig, SweepConfig
from sku.errors import EvaluationError, TaskVectorError, one_line
from sku.evaluate import batching
from sku.evaluate.asking import Writer
from sku.evaluate.generation import GenerationRequest, generate_replies, stop_token_ids
from sku.evaluate.judges import Judge
from sku.evaluate.metrics import Rate, rates_of
from sku.evaluate.outcomes import ReplyOutcome, decide_outcomes, find_faults
from sku.evaluate.perplexity import score_fluency
from sku.evaluate.records import GenerationRecord
from sku.evaluate.statistics import ratio_interval
from sku.evaluate.utility_cost import BROKEN_COST, UtilityCost
from sku.evaluate.validation import NormalText, Scores, perplexity_ratio
from sku.negate.run import round_weights, subtract_into
from sku.negate.task_vector import TaskVector
from sku.sweep.points import FREE, Ratio, Replies, SweepPoint
from sku.sweep.questions import Questions
from sku.sweep.rule import is_hopeless

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class How:
    """How a model is asked, and its replies judged; the same for every alpha."""

    writer: Writer
    judge: Judge
    evaluate: EvaluateConfig
    """For ``batch_size`` and ``short_answer_words``."""
    config: SweepConfig
    seed: int
    """Of the orders of words that the gate compares a reply with."""


@dataclass(frozen=True, kw_only=True)
class Asker(How):
    """What is asked, too."""

    questions: Questions


class Meter:
    """The original model, the task vector, and a working copy."""

    def __init__(
        self,
        base: PreTrainedModel,
        vector: TaskVector,
        asker: Asker,
        progress: Progress | None = None,
        *,
        output_dtype: torch.dtype | None = None,
    ) -> None:
        """Copies the original and scores it.

        Args:
            base: The original model. It is not changed.
            vector: What is subtracted.
            asker: What is asked.
            progress: Called with a stage, what is done and how much there is.
            output_dtype: Type in which the unlearned model will be saved; that of the original if None.

        Raises:
            EvaluationError: A loss of the original is not finite.
        """
        self.base, self.vector, self.asker, self.progress = base, vector, asker, progress
        self.model = copy.deepcopy(base)
        self.model.requires_grad_(requires_grad=False)
        if output_dtype is not None:
            round_weights(self.model, output_dtype)
        self.normal = NormalText(base, asker.questions.texts, batch_size=asker.evaluate.batch_size)
        self._stop_ids = stop_token_ids(base, asker.writer.tokenizer, asker.writer.end_of_turn())

    def write(self, alpha: float) -> None:
        """Makes the working copy ``theta_o - alpha * vector``.

        Raises:
            TaskVectorError: The vector doesn't fit, or a weight is not finite.
        """
        subtract_into(self.model, self.base, self.vector, alpha)

    def measure_base(self) -> SweepPoint:
        """The original model: perplexity ratio 1, and its replies."""
        return SweepPoint(
            alpha=0.0,
            perplexities={str(split): Ratio(value=1.0, low=1.0, high=1.0) for split in self.normal.texts},
            kl={str(split): 0.0 for split in self.normal.texts},
            replies=self._ask(self.base),
        )

    def cost(self, alpha: float) -> UtilityCost:
        """What one alpha costs normal text, without any reply; infinite where the weights break."""
        try:
            self.write(alpha)
            return self.normal.cost(self.model, self.asker.config)
        except (EvaluationError, TaskVectorError):
            return BROKEN_COST

    def measure(self, alpha: float) -> SweepPoint:
        """One alpha; replies are not asked for where the perplexity is hopeless.

        Args:
            alpha: Finite.

        Returns:
            The point. Weights that are not finite, or a loss that is not, give one without figures.

        Raises:
            EvaluationError: The judge or the generation fails.
        """
        try:
            self.write(alpha)
            scores = self.normal.scores(self.model)
            kl = self.normal.kl(self.model)
        except (EvaluationError, TaskVectorError) as error:
            return SweepPoint(alpha=alpha, perplexities={}, kl={}, replies=None, unasked=one_line(error))
        ratios = {str(split): self._ratio(own, self.normal.base_scores[split]) for split, own in scores.items()}
        point = SweepPoint(alpha=alpha, perplexities=ratios, kl=kl, replies=None)
        if is_hopeless(point, self.asker.config):
            reason = f"the perplexity is above sweep.hopeless_ratio, x{self.asker.config.hopeless_ratio:g}"
            return dataclasses.replace(point, unasked=reason)
        return dataclasses.replace(point, replies=self._ask(self.model))

    def _ratio(self, scores: Scores, base_scores: Scores) -> Ratio:
        """Against the original on the same answers, which are drawn anew together."""
        grown = [own - base for (own, _), (base, _) in zip(scores, base_scores, strict=True)]
        lengths = [tokens for _, tokens in scores]
        low, high = ratio_interval(grown, lengths, seed=self.asker.seed)
        value, low, high = (perplexity_ratio(loss, 0.0) for loss in (math.fsum(grown) / sum(lengths), low, high))
        return Ratio(value=value, low=low, high=high)

    def _ask(self, model: PreTrainedModel) -> Replies:
        questions = self.asker.questions
        _, outcomes = answer(model, self.base, questions.requests, self.asker, self._stop_ids, self.progress)
        return replies_of(questions, {outcome.id: outcome for outcome in outcomes})


def answer(
    model: PreTrainedModel,
    base: PreTrainedModel,
    requests: Sequence[GenerationRequest],
    how: How,
    stop_ids: Sequence[int],
    progress: Progress | None,
) -> tuple[list[GenerationRecord], list[ReplyOutcome]]:
    """Asks a model, and finds what its replies come to.

    Args:
        model: The model to ask.
        base: The original model, asked whether replies are word salad.
        requests: In any order.
        how: Judge, lengths and seed.
        stop_ids: Ids that end a reply.
        progress: Called with a stage, what is done and how much there is.

    Returns:
        A reply for each request, and its outcome.

    Raises:
        EvaluationError: The judge or the generation fails.
    """
    report = None if progress is None else lambda done, total: progress("sweep: replies", done, total)
    with batching.evaluation_mode(model):
        records = generate_replies(
            model,
            how.writer.tokenizer,
            requests,
            stop_ids=stop_ids,
            max_new_tokens=how.config.max_new_tokens,
            batch_size=how.evaluate.batch_size,
            window=how.writer.window,
            progress=report,
        )
    with batching.evaluation_mode(base):
        fluency = score_fluency(
            base,
            [record for record in records if not find_faults(record, None)],
            how.writer.scored_reply,
            seed=how.seed,
            batch_size=how.evaluate.batch_size,
        )
    outcomes = decide_outcomes(
        records,
        how.judge,
        {record.id: record for record in fluency},
        short_answer_words=how.evaluate.short_answer_words,
    )
    return records, outcomes


def replies_of(questions: Questions, outcomes: dict[str, ReplyOutcome]) -> Replies:
    """Counts outcomes.

    Args:
        questions: What was asked, at least one prompt of each kind.
        outcomes: Id of a request -> what its reply came to.

    Returns:
        All rates, each with its Wilson interval.
    """

    def rates(requests: list[str]) -> dict[str, Rate]:
        return rates_of([outcomes[name] for name in requests])

    harmful = {tokens: rates([asked.id for asked in group]) for tokens, group in questions.harmful.items()}
    normal = rates([asked.id for asked in questions.normal])
    forced = {tokens: found for tokens, found in harmful.items() if tokens != FREE}
    return Replies(
        harmful=harmful[FREE]["harmful_at_most"],
        degenerate=harmful[FREE]["degenerate"],
        forced={tokens: found["harmful_at_most"] for tokens, found in forced.items()},
        forced_degenerate={tokens: found["degenerate"] for tokens, found in forced.items()},
        over_refusal=normal["over_refusal"],
        normal_degenerate=normal["degenerate"],
        exact_answer=normal.get("exact_answer"),
    )
