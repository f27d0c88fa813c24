"""The part of the utility budget that needs replies: how many normal prompts are refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from transformers import PreTrainedModel

from sku.config import EvaluateConfig
from sku.data.examples import ForgetRetainData
from sku.evaluate import batching
from sku.evaluate.asking import Writer, free_request
from sku.evaluate.generation import generate_replies, stop_token_ids
from sku.evaluate.outcomes import find_faults
from sku.evaluate.records import GenerationRecord
from sku.evaluate.refusal import is_refusal
from sku.evaluate.sampling import draw_examples
from sku.evaluate.utility_cost import OVER_REFUSAL, RETAIN, Border

STEP_DOWN = 2**-0.5
STEPS = 6
"""From the border of perplexity and KL down to an eighth of it."""


class Refusals:
    """Prompts of ``retain_validation``, and how many of them the base model refuses."""

    def __init__(
        self, base: PreTrainedModel, writer: Writer, data: ForgetRetainData, config: EvaluateConfig, *, seed: int
    ) -> None:
        """Draws the prompts; the base model is asked when its share is needed.

        Args:
            base: The original model.
            writer: Of the model.
            data: ``retain_validation`` is used.
            config: For the number of prompts, the length of replies and the size of a batch.
            seed: Of the draw.
        """
        self._base, self._writer, self._config = base, writer, config
        self._requests = []
        for example in draw_examples(data.retain_validation, config.retain_prompts, seed=seed):
            request = free_request(RETAIN, example, writer)
            if len(request.input_ids) + config.max_new_tokens <= writer.window:
                self._requests.append(request)

    def excess(self, model: PreTrainedModel) -> float:
        """Share of the prompts that a model refuses, beyond the base model's; 0 where no prompt fits the model."""
        return self._share(model) - self._base_share if self._requests else 0.0

    @cached_property
    def _base_share(self) -> float:
        return self._share(self._base)

    def _share(self, model: PreTrainedModel) -> float:
        stop_ids = stop_token_ids(self._base, self._writer.tokenizer, self._writer.end_of_turn())
        with batching.evaluation_mode(model):
            records = generate_replies(
                model,
                self._writer.tokenizer,
                self._requests,
                stop_ids=stop_ids,
                max_new_tokens=self._config.max_new_tokens,
                batch_size=self._config.batch_size,
            )
        return sum(map(_refused, records)) / len(records)


def _refused(record: GenerationRecord) -> bool:
    """As the outcome ``refused``: broken language is none, and where the right answer is a refusal it is an answer."""
    return is_refusal(record.reply) and not is_refusal(record.reference) and not find_faults(record, None)


def step_down(border: Border, fits: Callable[[float], bool]) -> tuple[float, str | None]:
    """The largest strength tried, from the border of perplexity and KL down, that refuses few enough normal prompts.

    Args:
        border: Where perplexity or KL bind.
        fits: Strength -> whether over-refusal is within its limit there.

    Returns:
        The strength, 0 where none of ``STEPS`` fits, and what binds.
    """
    strength, bound_by = border.strength, border.bound_by
    for _ in range(STEPS):
        if strength == 0 or fits(strength):
            return strength, bound_by
        strength, bound_by = strength * STEP_DOWN, OVER_REFUSAL
    return 0.0, OVER_REFUSAL
