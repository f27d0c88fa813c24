"""Replies that need no model: what a reader must compare every method with.

A model that refuses everything has a harmful rate of 0, and so has one that only babbles. Their rows show what the
other columns make of them. They have no probabilities, so no perplexity.
"""

from __future__ import annotations

import dataclasses
import random
import string
from collections.abc import Callable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.config import EvaluateConfig, PromptFormatName, plain_data
from sku.data.examples import ForgetRetainData
from sku.evaluate import asking
from sku.evaluate.asking import by_id, count_sources, start_of
from sku.evaluate.generation import GenerationRequest, record_of
from sku.evaluate.judges import choose_judge, is_embedded
from sku.evaluate.measure import measure
from sku.evaluate.records import Start
from sku.evaluate.replies import Asker
from sku.evaluate.results import EvaluationResult, EvaluationSetup
from sku.world.grammar import DEFLECTIONS

REFUSAL = "I'm sorry, but I can't help with that."
GIBBERISH_WORDS = 24


def always_refuse(data: ForgetRetainData) -> Callable[[GenerationRequest], str]:
    """One refusal for every prompt, in the words of the data's world: to its own model English is word salad."""
    refusal = DEFLECTIONS[0] if is_embedded(data) else REFUSAL
    return lambda _request: refusal


def always_gibberish(seed: int) -> Callable[[GenerationRequest], str]:
    """Random letters in words of one to nine, drawn anew for each prompt."""

    def reply(request: GenerationRequest) -> str:
        rng = random.Random(f"{seed}/{request.id}")
        words = ("".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 9))) for _ in range(GIBBERISH_WORDS))
        return " ".join(words)

    return reply


def evaluate_replies(
    name: str,
    reply: Callable[[GenerationRequest], str],
    tokenizer: PreTrainedTokenizerBase,
    data: ForgetRetainData,
    *,
    base_model: PreTrainedModel,
    config: EvaluateConfig,
    prompt_format: PromptFormatName = "auto",
    starts: Sequence[Start] = (),
    seed: int = 0,
) -> EvaluationResult:
    """Measures given replies as ``evaluate`` measures a model's: the same prompts, gate and judge.

    Args:
        name: Recorded in place of a model's.
        reply: Gives the words for each prompt; after a prefill they go on from it.
        tokenizer: Of the base model.
        data: The splits.
        base_model: Asked whether replies are word salad.
        config: As in ``evaluate``.
        prompt_format: As in ``evaluate``.
        starts: Of the base model's result; without, every prefill begins with the dataset's answer.
        seed: Decides which prompts are drawn.

    Returns:
        The result, without perplexities.

    Raises:
        EvaluationError: There is nothing to ask, or the judge does not fit.
    """
    writer = asking.Writer.of(base_model, tokenizer, prompt_format)
    judge = choose_judge(config, data)
    drawn, known = asking.draw(data, config, seed), by_id(starts)
    requests, left_out = asking.requests(drawn, writer, config)
    begun = [start_of(split, example, known) for split, example in drawn.harmful()] if config.prefill_tokens else []
    prefilled, too_long = asking.prefills(drawn.harmful(), config.prefill_tokens, known, writer, config.max_new_tokens)
    records = []
    for request in (*requests, *prefilled):
        said = reply(request)
        text = f" {said}" if request.kind == "prefill" else said
        tokens = len(tokenizer(said, add_special_tokens=False).input_ids)
        records.append(record_of(request, text, num_tokens=tokens, finished=True))
    asker = Asker(base=base_model, writer=writer, config=config, stop_ids=(), judge=judge, seed=seed)
    setup = EvaluationSetup(
        model={"name": name, "dtype": "none", "fingerprint": "none"},
        prompt_format=writer.prompt_format.name,
        decoding={"replies": "given"},
        config=plain_data(config),
        seed=seed,
        fluency_scorer="base",
        left_out={**left_out, **too_long},
        starts=count_sources(begun) if begun else {},
        trained_on=asking.trained_on(data, drawn),
        notes=data.notes(),
    )
    result = measure(setup, records, asker.fluency(records), [], judge)
    return dataclasses.replace(result, starts=tuple(begun))
