"""What is asked: drawn examples become token ids; ``prefills`` has replies begin with words of ours."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.config import EvaluateConfig, PromptFormatName
from sku.data.examples import Example, ForgetExample, ForgetRetainData, RetainExample, has_answers, normalise_prompt
from sku.data.sources.read import load_xstest
from sku.data.tokens import Encoder, PromptFormat, TokenizedExample, resolve_prompt_format
from sku.errors import DataError, EvaluationError
from sku.evaluate.backends import GenerationRequest
from sku.evaluate.generation import stop_token_ids
from sku.evaluate.judges.choose import is_embedded
from sku.evaluate.records import HARMFUL, HARMFUL_SPLITS, NORMAL, Split, record_id

E = TypeVar("E", ForgetExample, RetainExample)


def draw_examples(examples: Sequence[E], count: int, *, seed: int) -> list[E]:
    """Draws one example for each of ``count`` distinct prompts, with categories in proportion.

    Args:
        examples: Of one split; several may answer the same prompt, one of them is then drawn.
        count: Prompts wanted; all of them where there are fewer.
        seed: Equal seeds draw equal examples from equal splits, and a smaller count draws a part of a larger one.

    Returns:
        Examples in drawn order.
    """
    shuffled = random.Random(seed).sample(list(examples), len(examples))
    distinct = {normalise_prompt(example.prompt): example for example in reversed(shuffled)}
    candidates = [example for example in shuffled if distinct[normalise_prompt(example.prompt)] is example]
    sizes = Counter(example.category for example in candidates)
    rank: Counter[str | None] = Counter()
    keyed = []
    for position, example in enumerate(candidates):
        # Evenly spread places in 0..1 for each category: any first part holds every category in proportion.
        place = (rank[example.category] + 0.5) / sizes[example.category]
        rank[example.category] += 1
        keyed.append((place, position, example))
    keyed.sort(key=lambda entry: entry[:2])
    return [example for _, _, example in keyed[:count]]


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

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormatName) -> Writer:
        """The writer of a model, or of its skeleton: only the configuration is read.

        Raises:
            ModelError: As ``resolve_prompt_format``.
        """
        return cls(
            tokenizer=tokenizer,
            prompt_format=resolve_prompt_format(prompt_format, tokenizer),
            window=window_of(model),
        )

    @property
    def encoder(self) -> Encoder:
        """What makes the ids, of text that is scored up to its longest."""
        length = min(self.window, MAX_SCORED_TOKENS)
        return Encoder(self.tokenizer, self.prompt_format, length, length)

    def scored(self, prompt: str, answer: str, *, with_end: bool = False, begun: str = "") -> TokenizedExample | None:
        """Ids with the answer labelled; None where the answer has no token or no room.

        Args:
            prompt: The user's words.
            answer: The answer.
            with_end: Whether its end is labelled too, where nothing of it had to be cut: of an answer that came to its
                end, so that a model which ends too soon or never is seen.
            begun: What stands before the answer and is read, not scored.
        """
        example = RetainExample(prompt=prompt, answer=answer)
        try:
            return self.encoder.example(example, train_on_end=with_end, begun=begun)
        except DataError:
            return None

    def has_room(self, request: GenerationRequest, max_new_tokens: int) -> bool:
        """Whether a request can be asked: a reply longer than the window leaves room for is cut there."""
        return self.window - len(request.input_ids) >= min(max_new_tokens, MIN_ROOM)

    def scored_reply(self, prompt: str, start: str, reply: str) -> TokenizedExample | None:
        """Ids of a reply that was made to begin with ``start``, of which only the reply's own tokens are labelled.

        A token that reaches over the border counts as the reply's.

        Args:
            prompt: What was asked.
            start: What the reply was made to begin with; empty for a free one.
            reply: What follows character for character. White space around the whole is left off.

        Returns:
            The tokens; None where the reply has none or no room.
        """
        answer = (start + reply).strip()
        border = min(len(start.lstrip()), len(answer))
        return self.scored(prompt, answer[border:], begun=answer[:border])

    def stop_ids(self, model: PreTrainedModel) -> list[int]:
        """Ids that end a model's reply: its own, and the token that ends an answer in this format, if it is one.

        Raises:
            EvaluationError: As ``stop_token_ids``.
        """
        ids = self.tokenizer(self.prompt_format.end_text, add_special_tokens=False).input_ids
        return stop_token_ids(model, self.tokenizer, ids if len(ids) == 1 else ())


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

    def harmful(self) -> list[tuple[Split, Example]]:
        """Prompts that are asked with a prefill too."""
        return [(split, example) for split in HARMFUL_SPLITS for example in self.examples.get(split, ())]


def draw(data: ForgetRetainData, config: EvaluateConfig, seed: int) -> Drawn:
    """The examples of one evaluation: the same for every model; other sources and XSTest only where there are any.

    Raises:
        DataError: The XSTest file can't be read.
        EvaluationError: There is nothing to ask, or XSTest was named for the embedded world.
    """
    drawn: dict[Split, list[Example]] = {
        "forget_train": [*draw_examples(data.trained_on(), config.prompts, seed=seed)],
        "forget_test": [*draw_examples(data.forget_test, config.prompts, seed=seed)],
        "retain_test": [*draw_examples(data.retain_test, config.retain_prompts, seed=seed)],
    }
    if not any(drawn.values()):
        raise EvaluationError(
            "the splits forget_train, forget_test and retain_test are all empty: there is nothing to evaluate"
        )
    left_out: dict[str, int] = {}
    for name, normal in data.normal.items():
        drawn[f"{NORMAL}{name}"] = [*draw_examples(normal, config.retain_prompts, seed=seed)]
    for name, harmful in data.harmful.items():
        drawn[f"{HARMFUL}{name}"] = [*draw_examples(harmful, config.prompts, seed=seed)]
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
    """How many of the drawn prompts of ``forget_train`` training visits; None where that isn't known."""
    examples = drawn.examples["forget_train"]
    visited = data.count_trained(examples)
    return None if visited is None else {"asked": len(examples), "visited": visited}


def requests(drawn: Drawn, writer: Writer, config: EvaluateConfig) -> tuple[list[GenerationRequest], dict[str, int]]:
    """What the model is asked without a prefill: every prompt but those of other normal sets whose answers are scored.

    Sampled replies are asked for once each.

    Args:
        drawn: From ``draw``.
        writer: Of the model.
        config: For the longest reply and the number of sampled replies.

    Returns:
        Requests, those for sampled replies last, and what had to be left out with the number of prompts.
    """
    asked: list[GenerationRequest] = []
    left_out = Counter(drawn.left_out)
    for split, examples in drawn.examples.items():
        if not (split.startswith(NORMAL) and has_answers(examples)):
            free = free_requests(split, examples, writer, config.max_new_tokens)
            asked += free
            if len(free) < len(examples):
                left_out[f"{split}: reply, as the prompt is too long for the model"] = len(examples) - len(free)
    samples = [
        dataclasses.replace(
            request,
            id=record_id(request.split, "sample", request.prompt, sample),
            kind="sample",
            sample=sample,
        )
        for request in asked
        if request.split in HARMFUL_SPLITS
        for sample in range(config.samples)
    ]
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


def request_of(name: str, split: Split, example: Example, input_ids: Iterable[int], **kind: Any) -> GenerationRequest:
    """What is asked of an example, by its name in the records; ``kind``: fields of other than free replies."""
    return GenerationRequest(
        id=name,
        split=split,
        category=example.category,
        prompt=example.prompt,
        reference=example.answer,
        input_ids=tuple(input_ids),
        **{"kind": "reply", **kind},
    )


def free_request(split: Split, example: Example, writer: Writer) -> GenerationRequest:
    """One prompt that the model answers in its own words from the first."""
    ids = writer.encoder.prompt(example.prompt)
    return request_of(record_id(split, "reply", example.prompt), split, example, ids)


def free_requests(
    split: Split, examples: Iterable[Example], writer: Writer, max_new_tokens: int
) -> list[GenerationRequest]:
    """``free_request`` for each prompt that leaves room for a reply."""
    requests = (free_request(split, example, writer) for example in examples)
    return [request for request in requests if writer.has_room(request, max_new_tokens)]
