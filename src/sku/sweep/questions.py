"""What is asked at every alpha: the same prompts, prefills and texts, drawn once."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sku.config import SweepConfig
from sku.data.examples import ForgetExample, ForgetRetainData, RetainExample
from sku.data.tokens import TokenizedExample
from sku.errors import EvaluationError
from sku.evaluate.asking import Writer, free_request, prefills
from sku.evaluate.generation import GenerationRequest
from sku.evaluate.record_files import header_hash
from sku.evaluate.records import Split
from sku.evaluate.sampling import draw_examples
from sku.evaluate.starts import Starts
from sku.evaluate.validation import validation_texts
from sku.sweep.points import FREE

StartsOf = Callable[[Sequence[GenerationRequest]], Starts]
"""Free requests -> what the prefills of their prompts begin with."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Requests and texts of one sweep."""

    harmful: dict[int, list[GenerationRequest]]
    """Tokens of a prefill, ``FREE`` for none -> requests of ``forget_validation``."""
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


def draw_questions(
    data: ForgetRetainData, writer: Writer, config: SweepConfig, *, seed: int, starts: StartsOf | None = None
) -> Questions:
    """Draws what a sweep asks.

    Args:
        data: ``forget_validation``, ``retain_validation`` and ``normal_validation`` are used, no other split.
        writer: Of the model.
        config: Numbers and lengths.
        seed: Of the draws.
        starts: Called once with the free requests of harmful prompts, for what prefills begin with; they begin with
            the dataset's answers if None.

    Returns:
        Requests and texts; what doesn't fit the model or has too short an answer for a prefill is counted.

    Raises:
        EvaluationError: A split has nothing that can be asked, or no answer is long enough for a prefill.
    """
    left_out: Counter[str] = Counter()
    drawn = draw_examples(data.forget_validation, config.prompts, seed=seed)
    normal = draw_examples(data.retain_validation, config.retain_prompts, seed=seed)
    free = _requests(drawn, "forget_validation", writer, config, left_out)
    forced, too_long = prefills(
        [("forget_validation", example) for example in drawn],
        config.forced_tokens,
        starts(free) if starts is not None and free and config.forced_tokens else {},
        writer,
        config.max_new_tokens,
    )
    left_out.update(too_long)
    lengths = sorted(set(config.forced_tokens))
    by_length = {tokens: [asked for asked in forced if asked.forced_tokens == tokens] for tokens in lengths}
    asked = Questions(
        harmful={FREE: free, **by_length},
        normal=_requests(normal, "retain_validation", writer, config, left_out),
        texts=validation_texts(data, writer, config.retain_prompts, seed=seed),
        left_out={},
    )
    for tokens, requests in asked.harmful.items():
        if not requests:
            what = "prompt" if tokens == FREE else f"prefill of {tokens} tokens"
            raise EvaluationError(
                f"forget_validation has no {what} that can be asked ({len(drawn)} prompts drawn, {dict(left_out)}): "
                "take shorter prompts, change sweep.forced_tokens or raise sweep.validation_fraction"
            )
    if not asked.normal:
        raise EvaluationError("retain_validation has no prompt that can be asked: take shorter ones")
    return dataclasses.replace(asked, left_out=dict(left_out))


def _requests(
    examples: Sequence[ForgetExample | RetainExample],
    split: Split,
    writer: Writer,
    config: SweepConfig,
    left_out: Counter[str],
) -> list[GenerationRequest]:
    requests = []
    for example in examples:
        request = free_request(split, example, writer)
        if writer.has_room(request, config.max_new_tokens):
            requests.append(request)
        else:
            left_out[f"{split}: the prompt is too long for the model"] += 1
    return requests
