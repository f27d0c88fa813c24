"""What every backend is given and gives back, how words are sampled, and whether one says what ``generate`` says.

``generate`` draws all rows of a batch from torch's one global generator, so that a reply would change with its
neighbours. Here the scores get Gumbel noise from the row's own generator, and the largest of them is taken: that is an
exact draw from their softmax (Gumbel-max; Maddison, Tarlow and Minka, NeurIPS 2014).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

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
from sku.evaluate.records import Asked, GenerationRecord, grouped

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
        return int.from_bytes(digest[:8], "big") >> 1  # Backends take signed 64-bit numbers.

    def settings(self) -> dict[str, Any]:
        """What the sampled replies add to the decoding settings of an evaluation."""
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


class RowSampler(LogitsProcessor):
    """Turns the greedy choice of ``generate`` into a draw: its hook ``logits_processor``, and nothing else of it.

    The n-th word of a reply takes the n-th noise vector of the row's generator, whatever else is in the batch.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling, device: torch.device) -> None:
        """Begins the replies of one batch.

        Args:
            seeds: One a row, in the order of the rows.
            sampling: Temperature and top-p.
            device: Where the scores are.
        """
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
    """Leaves the likeliest words that hold a share of probability, the one that completes it included.

    Args:
        scores_BV: Logits.
        top_p: The share, above 0 and below 1.

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
class GenerationRequest(Asked):
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
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int],
        max_new_tokens: int,
        window: int,
        sampling: Sampling | None = None,
    ) -> Decoding:
        """Of a model. Without a padding token the first stop id pads: what is masked is never read."""
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
        return cls(
            stop_ids=tuple(stop_ids),
            max_new_tokens=max_new_tokens,
            pad_id=int(pad_id),
            sampling=sampling,
            window=window,
        )

    def room_of(self, request: GenerationRequest) -> int:
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


class GenerationBackend(Protocol):
    """Continues prompts by token ids."""

    @property
    def at_once(self) -> int:
        """Prompts to give in one call: after each call the replies are saved."""
        ...

    def answer(self, requests: Sequence[GenerationRequest], decoding: Decoding) -> list[list[int]]:
        """The new ids of each reply, in order.

        Args:
            requests: At most ``at_once``.
            decoding: Where it draws, each reply must depend on its own request's seed alone.

        Returns:
            Ids after the prompt, with the stop id where the reply ended itself; what follows it is not read.

        Raises:
            EvaluationError: The backend failed, or can't decode so.
        """
        ...


def by_room(requests: Sequence[GenerationRequest], decoding: Decoding) -> dict[int, list[int]]:
    """Longest reply -> places of the requests that may have it, for an engine that takes one limit a call."""
    return grouped(range(len(requests)), lambda place: decoding.room_of(requests[place]))


def decoding_settings(stop_ids: Sequence[int], max_new_tokens: int) -> dict[str, Any]:
    """The settings that decide the greedy replies, as they stand in the header of ``generations.jsonl``."""
    return {
        "do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens, "eos_token_id": list(stop_ids),
    }  # fmt: skip


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


CHECKED_PROMPTS = 16


@dataclass(frozen=True, kw_only=True)
class BackendCheck:
    """Greedy replies of a backend beside those of ``generate``."""

    prompts: int
    equal: int
    """Replies that are the same word for word."""

    def notes(self, backend: str) -> list[str]:
        """A sentence for the reader where replies differ."""
        note = (
            f"{self.equal} of {self.prompts} greedy replies of the backend {backend} equal those of generate: other "
            "kernels round otherwise, and a near tie between two words then ends otherwise"
        )
        return [] if self.equal == self.prompts else [note]


def compare_replies(
    backend: str, plain: Sequence[GenerationRecord], others: Sequence[GenerationRecord]
) -> BackendCheck:
    """Counts equal replies.

    Args:
        backend: For the message.
        plain: Greedy replies of ``generate``.
        others: Those of the backend, to the same requests in the same order.

    Returns:
        The count.

    Raises:
        EvaluationError: Fewer than half are equal: that is no rounding.
    """
    equal = sum(
        (one.reply, one.num_tokens, one.finished) == (other.reply, other.num_tokens, other.finished)
        for one, other in zip(plain, others, strict=True)
    )
    if 2 * equal < len(plain):
        raise EvaluationError(
            f"evaluate.backend {backend} gave the reply of generate to {equal} of {len(plain)} prompts only: it "
            "doesn't decode this model rightly; use evaluate.backend=generate"
        )
    return BackendCheck(prompts=len(plain), equal=equal)
