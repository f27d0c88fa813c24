"""Evaluations of models that never were: their replies are given."""

from __future__ import annotations

import dataclasses
import random
import string
from collections.abc import Callable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.config import EvaluateConfig, PromptFormatName, plain_data
from sku.data.examples import ForgetRetainData
from sku.evaluate.generation import prompts
from sku.evaluate.generation.backends import record_of
from sku.evaluate.generation.decoding import GenerationRequest
from sku.evaluate.generation.prompts import by_id, prefills
from sku.evaluate.generation.replies import ReplyGenerator
from sku.evaluate.judges.choose import choose_judge, is_embedded
from sku.evaluate.records import PrefillSource, start_id
from sku.evaluate.results import EvaluationResult, EvaluationSetup, measure
from sku.evaluate.run import _count as count_starts
from sku.evaluate.run import _prefill_keys as prefill_keys
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
    starts: Sequence[PrefillSource] = (),
    seed: int = 0,
) -> EvaluationResult:
    """Measures given replies as ``evaluate`` measures a model's: the same prompts, gate and judge; no perplexities."""
    encoder = prompts.PromptEncoder.of(base_model, tokenizer, prompt_format)
    judge = choose_judge(config, data)
    drawn = prompts.draw(data, config, seed)
    requests, left_out = prompts.requests(drawn, encoder, config)
    keys, unknown = prefill_keys(config, data, drawn)
    names = {start_id(split, example.prompt) for split, example in drawn.harmful()}
    begun = [start for start in starts if start.id in names] if any(map(str.isdigit, keys)) else []
    prefilled, not_asked = prefills(drawn.harmful(), keys, by_id(begun), encoder, config.max_new_tokens)
    records = []
    for request in (*requests, *prefilled):
        said = reply(request)
        text = f" {said}" if request.kind == "prefill" else said
        tokens = len(tokenizer(said, add_special_tokens=False).input_ids)
        records.append(record_of(request, text, num_tokens=tokens, finished=True))
    generator = ReplyGenerator(base=base_model, encoder=encoder, config=config, stop_ids=(), judge=judge, seed=seed)
    setup = EvaluationSetup(
        model={"name": name, "dtype": "none", "fingerprint": "none"},
        prompt_format=encoder.prompt_format.name,
        decoding={"replies": "given"},
        config=plain_data(config),
        seed=seed,
        fluency_scorer="base",
        left_out={**left_out, **unknown, **not_asked},
        starts=count_starts(drawn, begun) if begun else {},
        trained_on=prompts.trained_on(data, drawn),
        notes=data.notes(),
    )
    result = measure(setup, records, generator.fluency(records), [], judge)
    return dataclasses.replace(result, starts=tuple(begun))
