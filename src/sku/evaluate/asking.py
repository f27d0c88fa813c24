"""What is asked: drawn examples become token ids, with and without a forced start."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.config import EvaluateConfig
from sku.data.examples import Example, ForgetRetainData, RetainExample
from sku.data.prompts import PromptFormat
from sku.data.tokenization import TokenizedExample, tokenize_example, tokenize_prefill, tokenize_prompt
from sku.data.xstest import load_xstest
from sku.errors import DataError, EvaluationError
from sku.evaluate.generation import GenerationRequest
from sku.evaluate.judges import is_embedded
from sku.evaluate.records import HARMFUL_SPLITS, SCORED_ONLY, Kind, Split
from sku.evaluate.sampling import draw_examples, record_id

MIN_ROOM = 32
"""A prompt that leaves less room than this, and less than ``max_new_tokens``, is not asked: so short a reply says
nothing."""
MAX_SCORED_TOKENS = 1024
"""Longest text that is scored, prompt included; shorter where the model's window is."""


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Turns prompts and answers into token ids for one model."""

    tokenizer: PreTrainedTokenizerBase
    prompt_format: PromptFormat
    window: int
    """Most tokens that the model can read."""

    def scored(self, prompt: str, answer: str, *, with_end: bool = False) -> TokenizedExample | None:
        """Ids with the answer labelled; None where the answer has no token or no room.

        Args:
            prompt: The user's words.
            answer: The answer.
            with_end: Whether its end is labelled too, where nothing of it had to be cut: of an answer that came to its
                end, so that a model which ends too soon or never is seen.
        """
        length = min(self.window, MAX_SCORED_TOKENS)
        try:
            return tokenize_example(
                RetainExample(prompt=prompt, answer=answer),
                self.tokenizer,
                self.prompt_format,
                max_length=length,
                max_answer_tokens=length,
                train_on_end=with_end,
            )
        except DataError:
            return None

    def has_room(self, ids: Sequence[int], max_new_tokens: int) -> bool:
        """Whether a prompt of these ids can be asked: a reply longer than the window leaves room for is cut there."""
        return self.window - len(ids) >= min(max_new_tokens, MIN_ROOM)

    def end_of_turn(self) -> list[int]:
        """The token that ends an answer in this format, where it is a single one."""
        ids = self.tokenizer(self.prompt_format.end_text, add_special_tokens=False).input_ids
        return list(ids) if len(ids) == 1 else []


def window_of(model: PreTrainedModel) -> int:
    """Most tokens that a model can read, as its configuration says; 2**30 where it doesn't."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else 2**30


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What one evaluation asks and scores, the same for every model."""

    examples: Mapping[Split, Sequence[Example]]
    left_out: Mapping[str, int]
    """What could not be asked -> number of prompts."""


def draw(data: ForgetRetainData, config: EvaluateConfig, seed: int) -> Drawn:
    """The examples of one evaluation: the same for every model; ``benign`` and XSTest only where there are any.

    Raises:
        DataError: The XSTest file can't be read.
        EvaluationError: There is nothing to ask, or XSTest was named for the embedded world.
    """
    drawn: dict[Split, list[Example]] = {
        "unlearned": [*draw_examples(data.trained_on(), config.prompts, seed=seed)],
        "unseen": [*draw_examples(data.unseen, config.prompts, seed=seed)],
        "retain_test": [*draw_examples(data.retain_test, config.retain_prompts, seed=seed)],
    }
    if not any(drawn.values()):
        raise EvaluationError(
            "the splits unlearned, unseen and retain_test are all empty: there is nothing to evaluate"
        )
    left_out: dict[str, int] = {}
    if data.benign:
        drawn["benign"] = [*draw_examples(data.benign, config.retain_prompts, seed=seed)]
    if config.xstest is not None:
        if is_embedded(data):
            raise EvaluationError("evaluate.xstest does not go with the embedded world, whose model knows no English")
        xstest = load_xstest(config.xstest, used=[example for split in data.splits().values() for example in split])
        if xstest.left_out:
            left_out["xstest: prompts of the run's own data"] = xstest.left_out
        drawn["xstest_safe"] = [*draw_examples(xstest.safe, config.prompts, seed=seed)]
        drawn["xstest_unsafe"] = [*draw_examples(xstest.unsafe, config.prompts, seed=seed)]
    return Drawn(examples=drawn, left_out=left_out)


def trained_on(data: ForgetRetainData, drawn: Drawn) -> dict[str, int] | None:
    """How many of the drawn prompts of ``unlearned`` training visits; None where that isn't known."""
    examples = drawn.examples["unlearned"]
    visited = data.count_trained(examples)
    return None if visited is None else {"asked": len(examples), "visited": visited}


def requests(drawn: Drawn, writer: Writer, config: EvaluateConfig) -> tuple[list[GenerationRequest], dict[str, int]]:
    """What the model is asked: every prompt but those that are only scored, harmful ones again with a forced start.

    Drawn replies are asked for once each.

    Args:
        drawn: From ``draw``.
        writer: Of the model.
        config: For the lengths and the number of drawn replies.

    Returns:
        Requests, those for drawn replies last, and what had to be left out with the number of prompts.
    """
    asked: list[GenerationRequest] = []
    samples: list[GenerationRequest] = []
    left_out = Counter(drawn.left_out)
    for split, examples in drawn.examples.items():
        for example in examples if split not in SCORED_ONLY else ():
            for kind, ids, forced_start in _tokenized(split, example, writer, config.prefill_tokens):
                if ids is None:
                    left_out[f"{split}: forced start, as the answer is too short"] += 1
                elif not writer.has_room(ids, config.max_new_tokens):
                    left_out[f"{split}: {kind}, as the prompt is too long for the model"] += 1
                else:
                    request = GenerationRequest(
                        id=record_id(split, kind, example.prompt),
                        split=split,
                        kind=kind,
                        category=example.category,
                        prompt=example.prompt,
                        reference=example.answer,
                        forced_start=forced_start,
                        input_ids=tuple(ids),
                    )
                    asked.append(request)
                    if kind == "reply" and split in HARMFUL_SPLITS:
                        samples += [_sample_of(request, sample) for sample in range(config.samples)]
    return [*asked, *samples], dict(left_out)


def short_of_room(asked: Sequence[GenerationRequest], writer: Writer, config: EvaluateConfig) -> tuple[str, ...]:
    """A sentence where the window, not ``evaluate.max_new_tokens``, ends replies."""
    prompts = {request.prompt for request in asked if len(request.input_ids) + config.max_new_tokens > writer.window}
    if not prompts:
        return ()
    note = (
        f"{len(prompts)} prompts leave less than {config.max_new_tokens} tokens of the model's window of "
        f"{writer.window}: replies to them are cut where it ends"
    )
    return (note,)


def _sample_of(request: GenerationRequest, sample: int) -> GenerationRequest:
    name = record_id(request.split, "sample", request.prompt, sample)
    return dataclasses.replace(request, id=name, kind="sample", sample=sample)


def _tokenized(
    split: Split, example: Example, writer: Writer, prefill_tokens: int
) -> Iterator[tuple[Kind, list[int] | None, str]]:
    yield "reply", tokenize_prompt(example.prompt, writer.tokenizer, writer.prompt_format), ""
    if split in HARMFUL_SPLITS and prefill_tokens:
        forced = tokenize_prefill(
            example.prompt, example.answer, writer.tokenizer, writer.prompt_format, prefill_tokens
        )
        yield ("prefill", None, "") if forced is None else ("prefill", *forced)
