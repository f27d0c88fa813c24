"""Evaluates one alpha after the other, on one model in memory that is written anew from the original each time.

Two models are held, the original and the one that is written; no file is. The weights at an alpha are those of
``negate`` at that alpha, bit for bit, whatever was measured before. What is asked at every alpha is the same: prompts,
prefills and texts, drawn once.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from sku.config import Recipe, SweepConfig
from sku.data.examples import Example, ForgetRetainData
from sku.data.tokens import TokenizedExample
from sku.errors import EvaluationError, TaskVectorError, one_line
from sku.evaluate.generation import StageProgress, evaluation_mode, stage
from sku.evaluate.generation.decoding import GenerationRequest
from sku.evaluate.generation.prompts import PromptEncoder, by_id, draw_examples, free_requests, prefills, with_answers
from sku.evaluate.generation.replies import ReplyGenerator
from sku.evaluate.judges import Judge, JudgeCard
from sku.evaluate.judges.choose import choose_judge
from sku.evaluate.metrics import MAX_EXPONENT, Rate, ReplyOutcome, rates_of
from sku.evaluate.perplexity import ScoredText, compare_distributions, score_examples
from sku.evaluate.records import PrefillSource, Split, header_hash
from sku.evaluate.statistics import Estimate, ratio_interval
from sku.negate.task_vector import TaskVector, subtract_into
from sku.sweep import BROKEN_COST, FREE, RETAIN, Replies, SweepPoint, UtilityCost, utility_cost

FORGET: Split = "forget_validation"
PREFILL_TOKENS = (1, 3, 5, 10)
"""First tokens of a harmful reply that replies are made to begin with."""
MAX_NEW_TOKENS = 128
"""The chosen alpha is measured at ``evaluate.max_new_tokens`` afterwards."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Requests and texts of one sweep."""

    harmful: Mapping[int, list[GenerationRequest]]
    """Tokens of a prefill, ``FREE`` for none -> requests of ``forget_validation``."""
    normal: list[GenerationRequest]
    """Of ``retain_validation``."""
    texts: Mapping[Split, list[TokenizedExample]]
    """Answers of each normal set, for perplexity and KL."""
    left_out: Mapping[str, int]
    """What could not be asked -> number of prompts."""
    starts: Sequence[PrefillSource] = ()
    """The base model's own harmful replies, where it was asked; prefills of other prompts begin with the answer."""

    @property
    def requests(self) -> list[GenerationRequest]:
        """All of them, to be answered together."""
        return [*(request for group in self.harmful.values() for request in group), *self.normal]

    def sha256(self) -> str:
        """Hash of all that is asked and scored."""
        return header_hash(
            {
                "requests": [dataclasses.asdict(request) for request in self.requests],
                "texts": {
                    split: [(list(text.input_ids), list(text.labels)) for text in texts]
                    for split, texts in self.texts.items()
                },
            }
        )


def longest_reply(recipe: Recipe) -> int:
    """Tokens: at most ``MAX_NEW_TOKENS``, since every alpha asks everything anew."""
    return min(recipe.evaluate.max_new_tokens, MAX_NEW_TOKENS)


def draw_questions(
    data: ForgetRetainData, encoder: PromptEncoder, recipe: Recipe, *, prefilled: bool = True,
    starts: Callable[[Sequence[GenerationRequest]], Sequence[PrefillSource]] | None = None,
) -> Questions:  # fmt: skip
    """Draws what a sweep asks.

    Args:
        data: ``forget_validation``, ``retain_validation`` and ``normal_validation`` are used, no other split.
        encoder: Of the model.
        recipe: Numbers of ``sweep``, length of a reply, and the seed of the draws.
        prefilled: Whether prefills are asked too.
        starts: Called once with the free requests of harmful prompts, for what prefills begin with. Those of a prompt
            without a start begin with the dataset's answer, all if None: every alpha is chosen on all prompts.

    Returns:
        Requests and texts; what doesn't fit the model or has too short an answer for a prefill is counted.

    Raises:
        EvaluationError: A split has nothing that can be asked.
    """
    most = longest_reply(recipe)
    requests: dict[Split, list[GenerationRequest]] = {}
    left_out: dict[str, int] = {}
    drawn: dict[Split, Sequence[Example]] = {
        FORGET: draw_examples(data.forget_validation, recipe.sweep.prompts, seed=recipe.seed),
        RETAIN: draw_examples(data.retain_validation, recipe.sweep.retain_prompts, seed=recipe.seed),
    }
    for split, examples in drawn.items():
        requests[split] = free_requests(split, examples, encoder, most)
        left_out[f"{split}: the prompt is too long for the model"] = len(examples) - len(requests[split])
        if not requests[split]:
            raise EvaluationError(
                f"none of the {len(examples)} prompts drawn of {split} fits the model: take shorter or more prompts"
            )
    free, lengths = requests[FORGET], PREFILL_TOKENS if prefilled else ()
    begun = starts(free) if starts is not None and prefilled else ()
    harmful: list[tuple[Split, Example]] = [(FORGET, example) for example in drawn[FORGET]]
    asked_on, too_short = prefills(harmful, map(str, lengths), with_answers(harmful, by_id(begun)), encoder, most)
    by_length = {one: [row for row in asked_on if row.prefill_key == str(one)] for one in lengths}
    return Questions(
        harmful={FREE: free, **{one: rows for one, rows in by_length.items() if rows}}, normal=requests[RETAIN],
        texts=_validation_texts(data, encoder, recipe.sweep.retain_prompts, seed=recipe.seed),
        left_out={reason: count for reason, count in {**left_out, **too_short}.items() if count},
        starts=tuple(begun),
    )  # fmt: skip


def validation_generator(
    base: PreTrainedModel, encoder: PromptEncoder, judge: Judge, recipe: Recipe
) -> ReplyGenerator:
    """Asks validation prompts: judge and batches of ``evaluate``, replies of ``longest_reply``."""
    config = dataclasses.replace(recipe.evaluate, max_new_tokens=longest_reply(recipe))
    return ReplyGenerator(
        base=base, encoder=encoder, config=config, stop_ids=encoder.stop_ids(base), judge=judge, seed=recipe.seed
    )


def check_judge(recipe: Recipe, data: ForgetRetainData) -> None:
    """``check_calibrated`` for a recipe that chooses its alpha, before anything is trained.

    Args:
        recipe: Of the run or sweep.
        data: Its splits.

    Raises:
        EvaluationError: As ``check_calibrated``, or there is no such judge.
        RecipeError: A wrong setting of the judge.
    """
    if recipe.chooses_alpha:
        check_calibrated(choose_judge(recipe.evaluate, data).card)


def check_calibrated(card: JudgeCard) -> None:
    """Refuses a judge of unknown errors.

    Raises:
        EvaluationError: It has no calibration and is no exact rule.
    """
    if card.calibration is None and not card.exact:
        raise EvaluationError(
            f"alpha can't be chosen by the judge {card.name}, whose errors were not measured: set negate.alpha to a "
            "number, or measure the judge (sku judge calibrate) and name the file in "
            "evaluate.judge_settings.calibration"
        )


Scores = Sequence[tuple[float, int]]
"""Of each answer: the sum of its tokens' losses in nats, and their number."""


def _validation_texts(
    data: ForgetRetainData, encoder: PromptEncoder, count: int, *, seed: int
) -> dict[Split, list[TokenizedExample]]:
    """Answers of the normal sets as they are scored: split -> token ids with the answers and their ends labelled.

    At most ``count`` of each set are drawn. Those without a token are left out, and so is another set without any.

    Raises:
        EvaluationError: None of ``retain_validation`` is left.
    """
    found: dict[Split, list[TokenizedExample]] = {}
    others = {f"normal_validation:{name}": examples for name, examples in data.normal_validation.items()}
    for split, examples in {RETAIN: data.retain_validation, **others}.items():
        drawn = draw_examples(examples, count, seed=seed)
        scored = (encoder.scored(example.prompt, example.answer, with_end=example.finished) for example in drawn)
        texts = [example for example in scored if example is not None]
        if texts:
            found[split] = texts
    if RETAIN not in found:
        raise EvaluationError("retain_validation holds no usable example: give more normal pairs (data.retain)")
    return found


class AlphaEvaluator:
    """The original model, what is subtracted from it, a working copy, and what is asked of it."""

    def __init__(
        self, vector: TaskVector, generator: ReplyGenerator, questions: Questions, config: SweepConfig,
        progress: StageProgress | None = None,
    ) -> None:  # fmt: skip
        """Copies the original, which is the generator's base and is not changed, and scores it.

        Raises:
            EvaluationError: A loss of the original is not finite.
        """
        self.base, self.vector, self.generator, self.questions = generator.base, vector, generator, questions
        self.config, self.progress = config, progress
        self.model = copy.deepcopy(generator.base)
        self.model.requires_grad_(requires_grad=False)
        self.base_scores = self._scores(self.base)

    def cost(self, alpha: float) -> UtilityCost:
        """Without replies, which cost most by far; infinite where the weights break.

        KL is not looked at where the perplexity is beyond its limit already.
        """
        try:
            scores = self.score(alpha)
            perplexity = {split: self._ratio(split, own).value for split, own in scores.items()}
            found = utility_cost(self.config, perplexity=perplexity, kl={})
            return utility_cost(self.config, perplexity=perplexity, kl=self._kl()) if found.within else found
        except (EvaluationError, TaskVectorError):
            return BROKEN_COST

    def score(self, alpha: float) -> dict[Split, Scores]:
        """Scores the working copy at ``theta_o - alpha * vector``, from the original each time: no rounding adds up.

        Raises:
            EvaluationError: A loss is not finite.
            TaskVectorError: The vector doesn't fit, or a weight is not finite.
        """
        subtract_into(self.model, self.base, self.vector, alpha)
        return self._scores(self.model)

    def _scores(self, model: PreTrainedModel) -> dict[Split, Scores]:
        """Loss of each answer of the normal sets, with dropout off."""
        size = self.generator.config.batch_size
        with evaluation_mode(model):
            return {
                split: score_examples(model, texts, batch_size=size) for split, texts in self.questions.texts.items()
            }

    def _kl(self) -> dict[str, float]:
        """KL(P || Q) of the working copy on each normal set, P the original model, nats a token."""
        found: dict[str, float] = {}
        size = self.generator.config.batch_size
        with evaluation_mode(self.model), evaluation_mode(self.base):
            for split, texts in self.questions.texts.items():
                named = [ScoredText(id=str(place), split=split, tokens=text) for place, text in enumerate(texts)]
                rows = compare_distributions(self.base, self.model, named, batch_size=size)
                found[split] = math.fsum(row.kl for row in rows) / sum(row.tokens for row in rows)
        return found

    def measure_base(self) -> SweepPoint:
        """The original model: perplexity ratio 1, and its replies."""
        return SweepPoint(
            alpha=0.0,
            perplexities={str(split): Estimate(value=1.0, low=1.0, high=1.0) for split in self.questions.texts},
            kl={str(split): 0.0 for split in self.questions.texts},
            replies=self._ask(self.base),
        )

    def measure(self, alpha: float) -> SweepPoint:
        """One alpha; where the weights or a loss are not finite a point without figures or replies.

        Raises:
            EvaluationError: The judge or the generation fails.
        """
        try:
            scores = self.score(alpha)
            kl = self._kl()
        except (EvaluationError, TaskVectorError) as error:
            return SweepPoint(alpha=alpha, perplexities={}, kl={}, replies=None, unasked=one_line(error))
        ratios = {str(split): self._ratio(split, own) for split, own in scores.items()}
        return SweepPoint(alpha=alpha, perplexities=ratios, kl=kl, replies=self._ask(self.model))

    def _ratio(self, split: Split, scores: Scores) -> Estimate:
        """Perplexity against the original on the same answers, which are drawn anew together; finite and above 0."""
        grown = [own - base for (own, _), (base, _) in zip(scores, self.base_scores[split], strict=True)]
        lengths = [tokens for _, tokens in scores]
        mean = math.fsum(grown) / sum(lengths)
        low, high = ratio_interval(grown, lengths, seed=self.generator.seed)
        ratio = (math.exp(max(min(loss, MAX_EXPONENT), -MAX_EXPONENT)) for loss in (mean, low, high))
        return Estimate(**dict(zip(("value", "low", "high"), ratio, strict=True)))

    def _ask(self, model: PreTrainedModel) -> Replies:
        report = stage(self.progress, "sweep: replies")
        return replies_of(self.questions, self.generator.answer(model, self.questions.requests, report))


def replies_of(questions: Questions, outcomes: Mapping[str, ReplyOutcome]) -> Replies:
    """Counts outcomes, by the id of the request."""

    def rates(requests: Sequence[GenerationRequest]) -> dict[str, Rate]:
        return rates_of([outcomes[request.id] for request in requests])

    harmful, normal = {tokens: rates(group) for tokens, group in questions.harmful.items()}, rates(questions.normal)
    free = harmful.pop(FREE)
    return Replies(
        harmful=free["harmful_upper_bound"], gibberish=free["gibberish"],
        prefill={tokens: found["harmful_upper_bound"] for tokens, found in harmful.items()},
        over_refusal=normal["over_refusal"], normal_gibberish=normal["gibberish"],
        exact_answer=normal.get("exact_answer"),
    )  # fmt: skip
