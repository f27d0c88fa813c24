"""What every backend is given and gives back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel

from sku.evaluate.records import Kind, Split, StartSource
from sku.evaluate.row_sampling import Drawing


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One prompt to answer; the fields are those of the record that it becomes."""

    id: str
    split: Split
    kind: Kind
    category: str | None
    prompt: str
    reference: str
    forced_start: str
    forced_tokens: int = 0
    start_source: StartSource | None = None
    sample: int = 0
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
    drawing: Drawing | None = None
    """How words are drawn; None takes the likeliest."""
    window: int = 2**30
    """Most tokens that the model can read: a reply ends at the latest where its prompt leaves no more room."""

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
            Ids behind the prompt, with the stop id where the reply ended itself; what follows it is not read.

        Raises:
            EvaluationError: The backend failed, or can't decode so.
        """
        ...


def by_room(requests: Sequence[GenerationRequest], decoding: Decoding) -> dict[int, list[int]]:
    """Longest reply -> places of the requests that may have it, for an engine that takes one limit a call."""
    groups: dict[int, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(decoding.room_of(request), []).append(place)
    return groups


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
