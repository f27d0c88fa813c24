"""Replies, in batches, that don't depend on the batch: greedy ones, and sampled ones with a seed each.

What a model's own ``generation_config`` says about sampling, penalties or length is switched off: base and unlearned
model answer under the same rules. It only adds token ids that end a reply.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.errors import EvaluationError
from sku.evaluate.backends import Decoding, GenerateBackend, GenerationBackend, GenerationRequest, Sampling
from sku.evaluate.batching import ALONE, Processes, Progress, evaluation_mode, in_batches
from sku.evaluate.records import GenerationRecord, Split
from sku.models import embedding_weight


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


def generate_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[GenerationRequest],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    window: int = 2**30,
    sampling: Sampling | None = None,
    backend: GenerationBackend | None = None,
    processes: Processes = ALONE,
    finished: Iterable[GenerationRecord] = (),
    keep: Callable[[Sequence[GenerationRecord]], None] | None = None,
    progress: Progress | None = None,
) -> list[GenerationRecord]:
    """Answers every request, greedily or by sampling words.

    Args:
        model: In evaluation mode, on any device or spread over several.
        tokenizer: Of the model. Without a padding token the first stop id pads: what is masked is never read.
        requests: In any order.
        stop_ids: Ids that end a reply.
        max_new_tokens: Longest reply.
        batch_size: Prompts at once; halved where GPU memory runs out.
        window: Most tokens that the model can read; the reply to a prompt that leaves less room is cut there.
        sampling: How words are sampled; None answers greedily.
        backend: What writes the replies; ``generate`` if None.
        processes: Share the batches; every process must call this with the same arguments, and gets all records.
        finished: Replies of an interrupted run. Batches are cut as if they were not there, and a batch is left out
            where all of it is: so the replies are those of an uninterrupted run, bit for bit.
        keep: Called in the main process with the replies of each finished batch.
        progress: Called after each batch.

    Returns:
        One record per request, in the order of the requests.

    Raises:
        EvaluationError: GPU memory runs out on a single prompt, or the backend fails.
    """
    decoding = Decoding.of(tokenizer, stop_ids, max_new_tokens, window, sampling)
    writer = GenerateBackend(model, batch_size) if backend is None else backend
    found = {record.id: record for record in finished}

    def answer(batch: list[int]) -> list[GenerationRecord]:
        asked = [requests[index] for index in batch]
        replies = writer.answer(asked, decoding)
        return [record_of_ids(request, ids, decoding, tokenizer) for request, ids in zip(asked, replies, strict=True)]

    return in_batches(
        [len(request.input_ids) for request in requests],
        answer,
        batch_size=writer.at_once,
        groups=[request.prompt for request in requests],
        processes=processes,
        finished={
            index: found[request.id]
            for index, request in enumerate(requests)
            if request.id in found and found[request.id].prefill == request.prefill
        },
        keep=keep,
        progress=progress,
    )


def record_of_ids(
    request: GenerationRequest, new_ids: list[int], decoding: Decoding, tokenizer: PreTrainedTokenizerBase
) -> GenerationRecord:
    """What was asked, with the reply that a backend wrote."""
    end = next((position for position, token in enumerate(new_ids) if token in decoding.stop_ids), None)
    before = list(request.input_ids)
    # As it stands after the prompt: some tokenizers drop the space of a first token.
    whole, start = (_decode(tokenizer, ids) for ids in ([*before, *new_ids[:end]], before))
    reply = whole.removeprefix(start) if whole.startswith(start) else _decode(tokenizer, new_ids[:end])
    return record_of(
        request,
        reply if request.kind == "prefill" else reply.strip(),
        num_tokens=len(new_ids) if end is None else end,
        finished=end is not None,
    )


def record_of(request: GenerationRequest, reply: str, *, num_tokens: int, finished: bool) -> GenerationRecord:
    """What was asked, with what was said."""
    asked = {name: value for name, value in vars(request).items() if name != "input_ids"}
    return GenerationRecord(**asked, reply=reply, num_tokens=num_tokens, finished=finished)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def fingerprint(model: PreTrainedModel, probes: Sequence[Sequence[int]]) -> str:
    """A hash of what a model computes: the same weights, adapters and dtype on the same device give the same.

    Args:
        model: Its dropout is off while it is asked.
        probes: Token ids of a few prompts; the scores after each are hashed.

    Returns:
        SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256()
    device = embedding_weight(model).device
    with evaluation_mode(model), torch.inference_mode():
        for ids in probes:
            scores = model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0, -1]
            digest.update(scores.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def about(model: PreTrainedModel, probes: Sequence[Sequence[int]]) -> dict[str, str]:
    """What tells a model from others in the header of a file."""
    return {"dtype": str(model.dtype).removeprefix("torch."), "fingerprint": fingerprint(model, probes)}


def probes_of(requests: Sequence[GenerationRequest]) -> list[tuple[int, ...]]:
    """The first prompt of each split."""
    first: dict[Split, tuple[int, ...]] = {}
    for request in requests:
        first.setdefault(request.split, request.input_ids)
    return list(first.values())
