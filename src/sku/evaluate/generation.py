"""Greedy replies, in batches, that don't depend on the batch.

What a model's own ``generation_config`` says about sampling, penalties or length is switched off: base and unlearned
model answer under the same rules. It only adds token ids that end a reply.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sku.errors import EvaluationError
from sku.evaluate.batching import Progress, pad, run_in_batches
from sku.evaluate.records import GenerationRecord, Kind, Split
from sku.models import embedding_weight


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
    sample: int = 0
    input_ids: tuple[int, ...]
    """The formatted prompt, and the forced start if there is one."""


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


def decoding_settings(stop_ids: Sequence[int], max_new_tokens: int) -> dict[str, Any]:
    """The settings that decide the replies, as they stand in the header of ``generations.jsonl``."""
    return {
        "do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens, "eos_token_id": list(stop_ids),
    }  # fmt: skip


def generate_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[GenerationRequest],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    progress: Progress | None = None,
) -> list[GenerationRecord]:
    """Answers every request greedily.

    Args:
        model: In evaluation mode, on any device or spread over several.
        tokenizer: Of the model. Without a padding token the first stop id pads: what is masked is never read.
        requests: In any order.
        stop_ids: Ids that end a reply.
        max_new_tokens: Longest reply.
        batch_size: Prompts at once; halved where GPU memory runs out.
        progress: Called after each batch.

    Returns:
        One record per request, in the order of the requests.

    Raises:
        EvaluationError: GPU memory runs out on a single prompt.
    """
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
    settings = GenerationConfig(**decoding_settings(stop_ids, max_new_tokens), pad_token_id=pad_id, use_cache=True)
    device = embedding_weight(model).device
    records: dict[int, GenerationRecord] = {}

    def answer(batch: list[int]) -> None:
        ids, mask = pad([requests[index].input_ids for index in batch], pad_id, left=True, device=device)
        with _only_these_settings(model, settings), torch.inference_mode():
            output = cast(Any, model).generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        for index, new_ids in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
            records[index] = _record(requests[index], new_ids, set(stop_ids), tokenizer)

    run_in_batches([len(request.input_ids) for request in requests], answer, batch_size=batch_size, progress=progress)
    return [records[index] for index in range(len(requests))]


@contextmanager
def _only_these_settings(model: PreTrainedModel | PeftModel, settings: GenerationConfig) -> Iterator[None]:
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


def _record(
    request: GenerationRequest, new_ids: list[int], stop_ids: set[int], tokenizer: PreTrainedTokenizerBase
) -> GenerationRecord:
    end = next((position for position, token in enumerate(new_ids) if token in stop_ids), None)
    reply = _decode_after(tokenizer, list(request.input_ids), new_ids[:end])
    return GenerationRecord(
        id=request.id,
        split=request.split,
        kind=request.kind,
        category=request.category,
        prompt=request.prompt,
        reference=request.reference,
        forced_start=request.forced_start,
        reply=reply if request.kind == "prefill" else reply.strip(),
        num_tokens=len(new_ids) if end is None else end,
        finished=end is not None,
        sample=request.sample,
    )


def _decode_after(tokenizer: PreTrainedTokenizerBase, before: list[int], new_ids: list[int]) -> str:
    """Text of ``new_ids`` as it stands behind ``before``: some tokenizers drop the space of a first token."""
    whole, start = (_decode(tokenizer, ids) for ids in ([*before, *new_ids], before))
    return whole.removeprefix(start) if whole.startswith(start) else _decode(tokenizer, new_ids)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
