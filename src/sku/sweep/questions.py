"""What is asked at every alpha: the same prompts, forced starts and texts, drawn once."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

from sku.config import SweepConfig
from sku.data.examples import ForgetExample, ForgetRetainData, RetainExample
from sku.data.tokenization import TokenizedExample, tokenize_prefill, tokenize_prompt
from sku.errors import EvaluationError
from sku.evaluate.asking import Writer
from sku.evaluate.generation import GenerationRequest
from sku.evaluate.record_files import header_hash
from sku.evaluate.records import Kind, Split
from sku.evaluate.sampling import draw_examples, record_id
from sku.evaluate.validation import validation_texts
from sku.sweep.points import FREE


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Requests and texts of one sweep."""

    harmful: dict[int, list[GenerationRequest]]
    """Forced tokens, ``FREE`` for none -> requests of ``forget_validation``."""
    normal: list[GenerationRequest]
    """Of ``retain_validation``."""
    texts: dict[Split, list[TokenizedExample]]
    """Answers of each normal set, for perplexity and KL."""
    left_out: dict[str, int]
    """What could not be asked -> number of prompts."""

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


def draw_questions(data: ForgetRetainData, writer: Writer, config: SweepConfig, *, seed: int) -> Questions:
    """Draws what a sweep asks.

    Args:
        data: ``forget_validation``, ``retain_validation`` and ``benign_validation`` are used, no other split.
        writer: Of the model.
        config: Numbers and lengths.
        seed: Of the draws.

    Returns:
        Requests and texts; what doesn't fit the model or has too short an answer for a forced start is counted.

    Raises:
        EvaluationError: A split has nothing that can be asked, or no answer is long enough for a forced start.
    """
    left_out: Counter[str] = Counter()
    drawn = draw_examples(data.forget_validation, config.prompts, seed=seed)
    normal = draw_examples(data.retain_validation, config.retain_prompts, seed=seed)
    lengths = (FREE, *sorted(set(config.forced_tokens)))
    asked = Questions(
        harmful={
            tokens: _requests(drawn, "forget_validation", tokens, writer, config, left_out) for tokens in lengths
        },
        normal=_requests(normal, "retain_validation", FREE, writer, config, left_out),
        texts=validation_texts(data, writer, config.retain_prompts, seed=seed),
        left_out={},
    )
    for tokens, requests in asked.harmful.items():
        if not requests:
            what = "prompt" if tokens == FREE else f"forced start of {tokens} tokens"
            raise EvaluationError(
                f"forget_validation has no {what} that can be asked ({len(drawn)} prompts drawn, {dict(left_out)}): "
                "lower sweep.max_new_tokens, change sweep.forced_tokens or raise sweep.validation_fraction"
            )
    if not asked.normal:
        raise EvaluationError("retain_validation has no prompt that can be asked: lower sweep.max_new_tokens")
    return dataclasses.replace(asked, left_out=dict(left_out))


def _requests(
    examples: list[ForgetExample] | list[RetainExample],
    split: Split,
    tokens: int,
    writer: Writer,
    config: SweepConfig,
    left_out: Counter[str],
) -> list[GenerationRequest]:
    requests = []
    for example in examples:
        start: tuple[list[int], str] | None
        if tokens == FREE:
            start = tokenize_prompt(example.prompt, writer.tokenizer, writer.prompt_format), ""
        else:
            start = tokenize_prefill(example.prompt, example.answer, writer.tokenizer, writer.prompt_format, tokens)
        where = split if tokens == FREE else f"{split}, {tokens} forced tokens"
        if start is None:
            left_out[f"{where}: the answer is too short"] += 1
        elif len(start[0]) + config.max_new_tokens > writer.window:
            left_out[f"{where}: the prompt is too long for the model"] += 1
        else:
            kind: Kind = "reply" if tokens == FREE else "prefill"
            name = record_id(split, kind, example.prompt)
            requests.append(
                GenerationRequest(
                    id=name if tokens == FREE else f"{name}/{tokens}",
                    split=split,
                    kind=kind,
                    category=example.category,
                    prompt=example.prompt,
                    reference=example.answer,
                    forced_start=start[1],
                    input_ids=tuple(start[0]),
                )
            )
    return requests
