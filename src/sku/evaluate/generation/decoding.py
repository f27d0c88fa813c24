"""How replies are decoded: greedily or by drawing words, with which ids at the end, how long at most.

What a model's own ``generation_config`` says about sampling, penalties or length is switched off: base and unlearned
model answer under the same rules. It only adds token ids that end a reply.

**Sampling.** ``generate`` of transformers draws all rows of a batch from torch's one global generator, so that a reply
would change with its neighbours. Here the scores get Gumbel noise from the row's own generator, and the largest of
them is taken: that is an exact draw from their softmax (Gumbel-max; Maddison, Tarlow and Minka, NeurIPS 2014).

Shapes: B = rows, V = vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
)

from sku.errors import EvaluationError
from sku.evaluate.records import PromptRecord

_FIRST_LOOK = 512
"""Likeliest words among which the end of top-p is looked for first; sorting a whole vocabulary takes longer than a
small model takes for the scores."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How words are sampled."""

    temperature: float
    top_p: float
    seed: int

    def row_seed(self, request_id: str) -> int:
        """The seed of one reply: of the evaluation's seed and the request's id alone."""
        digest = hashlib.sha256(f"{self.seed}/{request_id}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1  # Generators take signed 64-bit numbers.

    def settings(self) -> dict[str, Any]:
        """What the sampled replies add to the decoding settings of an evaluation."""
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


class RowSampler(LogitsProcessor):
    """Turns the greedy choice of ``generate`` into a draw, one seed a row of a batch.

    The n-th word of a reply takes the n-th noise vector of the row's generator, whatever else is in the batch.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling, device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._temperature = TemperatureLogitsWarper(float(sampling.temperature))
        self._top_p = sampling.top_p

    def keep(self, rows: Sequence[int]) -> None:
        """Leaves out all rows but these places, whose generators go on where they are."""
        self._generators = [self._generators[row] for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Adds a row's noise to its scores ``[B, V]``, after temperature and top-p."""
        scores = self._temperature(input_ids, scores)
        if self._top_p < 1:
            scores = keep_top_p(scores, self._top_p)
        exponential_BV = torch.empty_like(scores, dtype=torch.float32)
        for row_V, generator in zip(exponential_BV, self._generators, strict=True):
            row_V.exponential_(generator=generator)
        return scores - exponential_BV.log_()


def keep_top_p(scores_BV: Tensor, top_p: float) -> Tensor:
    """Leaves the likeliest words that hold a share of probability in (0, 1), the one that completes it included.

    Returns:
        ``[B, V]``: the same logits, minus infinity for all other words. Words as likely as the last one that is kept
        stay too.

    Source: Holtzman et al., arXiv 1904.09751, nucleus sampling.
    """
    logsum_B1 = scores_BV.float().logsumexp(dim=-1, keepdim=True)
    size = scores_BV.shape[-1]
    looked = min(_FIRST_LOOK, size)
    while True:
        best_Bk = scores_BV.topk(looked, dim=-1).values
        mass_Bk = (best_Bk.float() - logsum_B1).exp().cumsum(dim=-1)
        if looked == size or bool((mass_Bk[:, -1] >= top_p).all()):
            break
        looked = min(8 * looked, size)
    # The first place where the share is reached; the last one where rounding keeps the sum below it.
    last_B1 = (mass_Bk < top_p).sum(dim=-1, keepdim=True).clamp(max=looked - 1)
    return scores_BV.masked_fill(scores_BV < best_Bk.gather(-1, last_B1), float("-inf"))


@dataclass(frozen=True, kw_only=True)
class GenerationRequest(PromptRecord):
    """One prompt to answer."""

    sample: int = 0
    """As in the record that it becomes."""
    input_ids: tuple[int, ...]
    """The formatted prompt, and the tokens of a prefill if there is one."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Settings that decide the replies, whatever writes them."""

    stop_ids: tuple[int, ...]
    """Ids that end a reply."""
    max_new_tokens: int
    pad_id: int
    """What fills up shorter rows; it is masked and never read."""
    sampling: Sampling | None = None
    """How words are sampled; None takes the likeliest."""
    window: int = 2**30
    """Most tokens that the model can read: a reply ends at the latest where its prompt leaves no more room."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], **settings: Any) -> Decoding:
        """Of a model. Without a padding token the first stop id pads."""
        own = tokenizer.pad_token_id
        return cls(stop_ids=tuple(stop_ids), pad_id=int(stop_ids[0] if own is None else own), **settings)

    def max_new_tokens_for(self, request: GenerationRequest) -> int:
        """Longest reply to a request: ``max_new_tokens``, or what the window leaves where that is less."""
        return max(1, min(self.max_new_tokens, self.window - len(request.input_ids)))

    def generation_config(self, new_tokens: int) -> GenerationConfig:
        """For transformers; greedy, as the draw of ``RowSampler`` is made before the largest score is taken."""
        return GenerationConfig(
            **decoding_settings(self.stop_ids, new_tokens),
            pad_token_id=self.pad_id,
            use_cache=True,
            return_dict_in_generate=True,
        )


def decoding_settings(stop_ids: Sequence[int], max_new_tokens: int) -> dict[str, Any]:
    """The settings that decide the greedy replies, as they stand in the header of ``generations.jsonl``."""
    return {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens, "eos_token_id": list(stop_ids)}


def stop_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end_of_turn: Iterable[int] = ()
) -> list[int]:
    """Ids that end a reply: the tokenizer's, those of the model's ``generation_config``, and the chat format's.

    Raises:
        EvaluationError: There are none, so that no reply could ever end by itself.
    """
    configured = getattr(model, "generation_config", None)
    own = configured.eos_token_id if configured is not None else None
    ids = {*end_of_turn, *(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    if not ids:
        raise EvaluationError("neither tokenizer nor model names a token that ends a reply: set tokenizer.eos_token")
    return sorted(ids)


@contextmanager
def only_these_settings(model: PreTrainedModel | PeftModel, settings: GenerationConfig) -> Iterator[None]:
    """Hides the model's own generation settings: ``generate`` fills every unset field from them, penalties included.

    Under PEFT both the adapter model and the model inside hold a reference.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    holders: list[Any] = [holder for holder in (model, inner) if "generation_config" in vars(holder)]
    saved = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = settings
        yield
    finally:
        for holder, own in zip(holders, saved, strict=True):
            holder.generation_config = own
