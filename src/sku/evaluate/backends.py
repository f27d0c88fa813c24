"""What writes the replies: the backends, what each is given and gives back, how words are sampled, the choice by name.

**Sampling.** ``generate`` of transformers draws all rows of a batch from torch's one global generator, so that a reply
would change with its neighbours. Here the scores get Gumbel noise from the row's own generator, and the largest of
them is taken: that is an exact draw from their softmax (Gumbel-max; Maddison, Tarlow and Minka, NeurIPS 2014).

**generate**, the plain backend, against which the others are checked, computes a whole batch until its last reply
ends. Here it is called for ``CHUNK`` tokens at a time, going on from its own cache, and replies that ended leave batch
and cache between two calls: they cost nothing more, and those that stay get the tokens that they get without it. In
the cache a token is written into tensors with room for more, where transformers' own is copied whole for each token.
A prompt with several replies in a batch (sampled ones, one for each length of a prefill) is read once: each reply goes
on from a copy of its cache, with what is its own after the padding that makes all of a batch end together.

**vLLM** is an engine of its own that reads the model from a folder; to be installed apart. It decodes with the stop
ids, length, temperature, top-p and seeds of the evaluation and with nothing of the model's ``generation_config``. Its
sampled replies are other draws from the same distribution than those of ``generate``.

Shapes: B = rows, V = vocabulary, H = heads of keys and values, T = tokens so far, D = size of a head.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sku.config import EvaluateConfig
from sku.data.tokens import shared_length
from sku.errors import EvaluationError, first_line
from sku.evaluate.batching import pad
from sku.evaluate.records import Asked, grouped
from sku.models import embedding_weight, plain_model

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


ROOM = 64
"""Tokens that fit after those that are there before everything is copied once."""


class RoomyLayer(DynamicLayer):
    """``DynamicLayer`` whose keys and values are the beginning of larger tensors."""

    def __init__(self, layer: DynamicLayer) -> None:
        """Takes over what a layer holds.

        Args:
            layer: Of one model layer, with at least one token.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype, self.device = layer.dtype, layer.device
        self.keys, self.values = layer.keys, layer.values
        self.is_initialized = True
        self._shown: tuple[Tensor, ...] = ()
        self._room: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds the keys and values of new tokens, ``[B, H, new, D]``.

        Returns:
            Those of all tokens, ``[B, H, T, D]``; views, which the next call doesn't change.
        """
        assert self.keys is not None
        assert self.values is not None
        begun = self.keys.shape[-2]
        end = begun + key_states.shape[-2]
        # Whoever selects rows or crops puts other tensors in the place of those shown last.
        if not self._shown or self.keys is not self._shown[0] or end > self._room[0].shape[-2]:
            self._room = tuple(_with_room(part, end + ROOM) for part in (self.keys, self.values))
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[..., begun:end, :] = new
        self.keys, self.values = self._shown = tuple(room[..., :end, :] for room in self._room)
        return self.keys, self.values


def give_room(cache: Cache) -> None:
    """Puts a ``RoomyLayer`` in the place of each plain layer; layers of another kind (sliding windows, states) stay.

    Args:
        cache: With a token or more, so that its layers are what the model needs.
    """
    for place, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.get_seq_length() > 0:
            cache.layers[place] = RoomyLayer(layer)


def _with_room(part_BHTD: Tensor, tokens: int) -> Tensor:
    *rows, begun, size = part_BHTD.shape
    room = part_BHTD.new_empty(*rows, tokens, size)
    room[..., :begun, :] = part_BHTD
    return room


def _head(rows: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What some prompts begin with; each has a token of its own after it."""
    return rows[0][: min(shared_length(*rows), *(len(row) - 1 for row in rows))]


def _masks_padding(layer: Any, tokens: int) -> bool:
    """Whether padding between tokens is no more to a layer than padding before them.

    It is read by a layer with a state, and counted by one whose window is shorter than all there is.
    """
    wide = isinstance(layer, DynamicSlidingWindowLayer) and layer.sliding_window > tokens
    return wide or type(layer) is DynamicLayer


CHUNK = 32
"""Tokens between two looks at which replies have ended."""


class GenerateBackend:
    """``generate`` with padding on the left, on any device or a model spread over several."""

    def __init__(self, model: PreTrainedModel, batch_size: int) -> None:
        """Takes a model in evaluation mode.

        Args:
            model: It is not changed.
            batch_size: Prompts at once.
        """
        self._model = model
        takes = inspect.signature(plain_model(model).forward).parameters
        # What a cache of another name holds, as Mamba's, is left alone.
        self._drops_rows = "past_key_values" in takes
        # Without positions a model may count padding between tokens, as MPT does.
        self._reads_once = self._drops_rows and "position_ids" in takes
        self.at_once = batch_size

    def answer(self, requests: Sequence[GenerationRequest], decoding: Decoding) -> list[list[int]]:
        """As the protocol says."""
        if self._drops_rows:
            replies = self._replies(requests, decoding, CHUNK)
            if replies is not None:
                return replies
            self._drops_rows = False
        # All rows of a call end at one limit.
        found: dict[int, list[int]] = {}
        rooms = grouped(range(len(requests)), lambda place: decoding.room_of(requests[place]))
        for room, places in rooms.items():
            whole = self._replies([requests[place] for place in places], decoding, room)
            found |= dict(zip(places, whole or (), strict=True))
        return [found[place] for place in range(len(requests))]

    def _replies(self, requests: Sequence[GenerationRequest], decoding: Decoding, size: int) -> list[list[int]] | None:
        """The replies, ``size`` tokens a call; None where that needs a cache that can leave rows out, and it can't."""
        device, sampling, sampler = embedding_weight(self._model).device, decoding.sampling, None
        ids, mask, cache = self._begun(requests, decoding, device)
        if sampling is not None:
            sampler = RowSampler([sampling.row_seed(request.id) for request in requests], sampling, device)
        replies: list[list[int]] = [[] for _ in requests]
        rooms = [decoding.room_of(request) for request in requests]
        stops = set(decoding.stop_ids)
        rows = list(range(len(requests)))
        while rows:
            steps = min(size, *(rooms[row] - len(replies[row]) for row in rows))
            before = ids.shape[1]
            output = self._generate(ids, mask, decoding, steps, sampler, cache)
            cache, ids = output.past_key_values, output.sequences
            for row, new in zip(rows, ids[:, before:].tolist(), strict=True):
                replies[row] += new
            stay = [
                place
                for place, row in enumerate(rows)
                if len(replies[row]) < rooms[row] and stops.isdisjoint(replies[row][-(ids.shape[1] - before) :])
            ]
            if not stay:
                break
            if not isinstance(cache, Cache):
                return None
            give_room(cache)
            mask = torch.cat([mask, mask.new_ones(len(rows), ids.shape[1] - before)], dim=1)
            if len(stay) < len(rows):
                kept: Any = torch.tensor(stay, device=ids.device)
                # Selects rows as beam search does, which every kind of layer knows: attention and recurrent state.
                cache.reorder_cache(kept)
                ids, mask, rows = ids[kept], mask[kept], [rows[place] for place in stay]
                if sampler is not None:
                    sampler.keep(stay)
        return replies

    def _begun(
        self, requests: Sequence[GenerationRequest], decoding: Decoding, device: torch.device
    ) -> tuple[Tensor, Tensor, Cache | None]:
        """Ids and mask of a batch; and a cache of what replies to a prompt share, where that halves what is read."""
        rows = [request.input_ids for request in requests]
        fill = functools.partial(pad, value=decoding.pad_id, left=True, device=device)
        by_prompt = grouped(requests, lambda request: request.prompt)
        if not self._reads_once or len(by_prompt) == len(rows):
            return (*fill(rows), None)
        heads = {prompt: _head([request.input_ids for request in found]) for prompt, found in by_prompt.items()}
        own = [row[len(heads[request.prompt]) :] for row, request in zip(rows, requests, strict=True)]
        read = len(heads) * max(map(len, heads.values())) + len(own) * max(map(len, own))
        if all(heads.values()) and 2 * read <= len(rows) * max(map(len, rows)):
            places = {prompt: place for place, prompt in enumerate(heads)}
            of = torch.tensor([places[request.prompt] for request in requests], device=device)
            head_ids, head_mask = fill(list(heads.values()))
            own_ids, own_mask = fill(own)
            ids = torch.cat([head_ids[of], own_ids], dim=1)
            cache = self._generate(head_ids, head_mask, decoding, 1, None).past_key_values
            longest = ids.shape[1] + decoding.max_new_tokens
            if isinstance(cache, Cache) and all(_masks_padding(layer, longest) for layer in cache.layers):
                cache.reorder_cache(cast(Any, of))
                give_room(cache)
                return ids, torch.cat([head_mask[of], own_mask], dim=1), cache
            self._reads_once = False
        return (*fill(rows), None)

    def _generate(
        self,
        ids: Tensor,
        mask: Tensor,
        decoding: Decoding,
        steps: int,
        sampler: RowSampler | None,
        cache: Cache | None = None,
    ) -> Any:
        settings = decoding.generation_config(steps)
        hooks: dict[str, Any] = {} if sampler is None else {"logits_processor": LogitsProcessorList([sampler])}
        if cache is not None:
            hooks["past_key_values"] = cache
        with only_these_settings(self._model, settings), torch.inference_mode():
            return cast(Any, self._model).generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                **hooks,
            )


_CALLS_AT_ONCE = 16
_FREE_SHARE = 0.85
"""Of the GPU memory that is free: the evaluated model is there already."""


class VllmBackend:
    """``vllm.LLM`` on token ids."""

    def __init__(self, source: str, dtype: str, batch_size: int, seed: int) -> None:
        """Starts the engine.

        Args:
            source: Folder or hub id of the model, with weights in the form of transformers.
            dtype: Of the evaluated model, such as ``bfloat16``.
            batch_size: Replies are saved after 16 times as many.
            seed: Of the engine; sampled replies have seeds of their own.

        Raises:
            EvaluationError: vLLM is missing or doesn't start.
        """
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise EvaluationError(
                f"evaluate.backend is vllm, which can't be imported ({error}): pip install vllm in an environment "
                "whose torch and transformers it accepts, or use evaluate.backend=generate"
            ) from None
        options: dict[str, Any] = {"model": source, "dtype": dtype, "seed": seed, "generation_config": "vllm"}
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            options["gpu_memory_utilization"] = _FREE_SHARE * free / total
        try:
            self._engine = LLM(**options)
        except (RuntimeError, ValueError, OSError) as error:
            reason = first_line(error)
            raise EvaluationError(f"vllm can't start on {source} ({reason}): use evaluate.backend=generate") from error
        self._params = SamplingParams
        self.at_once = _CALLS_AT_ONCE * batch_size

    def answer(self, requests: Sequence[GenerationRequest], decoding: Decoding) -> list[list[int]]:
        """As the protocol says."""
        found = self._engine.generate(
            [{"prompt_token_ids": list(request.input_ids)} for request in requests],
            [self._params(**self._settings(request, decoding)) for request in requests],
            use_tqdm=False,
        )
        if len(found) != len(requests):
            raise EvaluationError(f"vllm gave {len(found)} replies to {len(requests)} prompts")
        return [_ids_of(output.outputs[0], decoding) for output in found]

    def _settings(self, request: GenerationRequest, decoding: Decoding) -> dict[str, Any]:
        shared: dict[str, Any] = {
            "max_tokens": decoding.room_of(request), "stop_token_ids": list(decoding.stop_ids), "detokenize": False,
        }  # fmt: skip
        sampling = decoding.sampling
        if sampling is None:
            return {**shared, "temperature": 0.0}
        return {
            **shared,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.row_seed(request.id),
        }


def _ids_of(completion: Any, decoding: Decoding) -> list[int]:
    ids = list(completion.token_ids)
    if completion.finish_reason == "stop" and not set(ids) & set(decoding.stop_ids):
        ids.append(decoding.stop_ids[0])  # The reply ended itself, and the engine kept the id to itself.
    return ids


def choose_backend(
    config: EvaluateConfig, model: PreTrainedModel, *, source: str | Path | None, seed: int, processes: int = 1
) -> GenerationBackend:
    """The backend that ``evaluate.backend`` names.

    Args:
        config: Name and batch size.
        model: The model to evaluate.
        source: Where the same weights can be read from, for ``vllm``; None for a model that is in memory only.
        seed: Of the evaluation.
        processes: Number of processes of this job.

    Returns:
        The backend.

    Raises:
        EvaluationError: vLLM is missing, doesn't start, or has no folder to read.
    """
    if config.backend == "generate":
        return GenerateBackend(model, config.batch_size)
    check_source(config, source, processes)
    return VllmBackend(str(source), str(model.dtype).removeprefix("torch."), config.batch_size, seed)


def check_source(config: EvaluateConfig, source: str | Path | None, processes: int) -> None:
    """Refuses ``vllm`` where it can't be used.

    Args:
        config: Names the backend; the others can always be used.
        source: As in ``choose_backend``.
        processes: As in ``choose_backend``.

    Raises:
        EvaluationError: The model lies in no folder, or there are several processes.
    """
    if config.backend != "vllm":
        return
    if source is None:
        raise EvaluationError(
            "evaluate.backend is vllm, which reads the model from a folder, and this one is in memory only: save it, "
            "then sku evaluate FOLDER --set evaluate.backend=vllm"
        )
    if processes > 1:
        raise EvaluationError("evaluate.backend is vllm, which starts its own processes: run it without accelerate")
