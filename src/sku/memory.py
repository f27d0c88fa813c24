"""Memory of stage 1 by a formula, and whether activations are computed twice so that it fits.

With R rows of T tokens, of each of which A predictions are compared, w the inputs and outputs of all linear layers of
the L decoder layers together, d their width, V the vocabulary and b the bytes of a number:

    kept    = k b R T w,  or  b R T L d  with activation checkpointing
    largest = kept + c 4 R A V,  or with checkpointing  kept + max(c 4 R A V, k b R T w / L)
    needed  = weights + reference + optimizer + max(largest, gradients + k b R T w / L)

k says how often torch keeps a number that goes into or out of a linear layer for the backward pass, c how many copies
of the float32 scores there are at once. Gradients come while activations go; where they are accumulated they lie
beside all of them. ``docs/scaling.md`` says how far it is from what was measured.
"""

from __future__ import annotations

import dataclasses
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sku.config.recipe import Recipe
from sku.errors import ModelError, RecipeError, SkuError, one_line
from sku.losses import CHUNK_BYTES
from sku.methods.run import resolve_method, with_safe_dtype
from sku.methods.sku import sku_objective
from sku.models import embedding_weight, load_config, pick_device, pick_dtype, with_adapter, without_weights
from sku.training import decoder_layers
from sku.training.config import state_bytes
from sku.training.run import adapter_settings

GIB = 2**30
_CONTEXT_BYTES = int(0.6 * GIB)
"""Assumed for what CUDA and its libraries take on a GPU; no tensor of ours."""
_FRAGMENTATION = 0.05
"""Assumed share of memory that the allocator holds and can't use."""
_NF4_BYTES = 0.516
"""Of each weight: four bits, an eight-bit scale for 64 weights, and a float for 256 scales (double quantization)."""
_KEPT, _KEPT_CAST = 1.2, 1.8
"""k as it is in Llama and Qwen, and where numbers are kept in two types: a float32 adapter on 16-bit weights without
``bf16``, or float32 weights that are all trained with it."""
_SCORES, _SCORES_FLOAT32 = 2.5, 4.0
"""c where scores come in 16 bits, and where they are float32 from the start."""
_KEY = "activation_checkpointing"


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of stage 1 on each GPU at the fullest moment; nothing is sharded."""

    weights: int
    reference: int
    optimizer: int
    gradients: int
    activations: int
    """With scores and losses."""
    models: int
    """Of the original and the unlearned model, which are evaluated side by side: beside none of the others."""

    @property
    def total(self) -> int:
        """Of stage 1."""
        return self.weights + self.reference + self.optimizer + self.gradients + self.activations

    @property
    def needed(self) -> int:
        """Of a run, with what is assumed for CUDA and for memory that can't be used."""
        return round(max(self.total, self.models) * (1 + _FRAGMENTATION)) + _CONTEXT_BYTES


def stage_1_memory(recipe: Recipe) -> Memory:
    """The formula for a recipe on the device that it would run on, every row as long as it may be.

    Raises:
        RecipeError: Another method than ``sku``, or an impossible setting.
        ModelError: The configuration can't be read, or most weights of its layers are in no linear layer (experts).
    """
    if recipe.method != "sku":
        raise RecipeError(f"it is of stage 1 of sku, and the recipe's method is {recipe.method}")
    acquire, config = recipe.acquire, with_safe_dtype(recipe)
    training, rows = resolve_method(recipe).training, sku_objective(acquire).rows
    found = load_config(config)
    dtype = pick_dtype(config.dtype, pick_device(config.device))
    if config.dtype == "stored":
        dtype = getattr(found, "dtype", None) or torch.float32
    four_bit = acquire.tuning == "qlora"
    # Under QLoRA what is not quantized is float32, and so are the activations between four-bit layers.
    model = without_weights(found, torch.float32 if four_bit else dtype, config.path)
    layers = decoder_layers(model)[1]
    linear = [module.weight for module in layers.modules() if isinstance(module, nn.Linear | Conv1D)]
    if 2 * sum(weight.numel() for weight in linear) < sum(weight.numel() for weight in layers.parameters()):
        raise ModelError(f"it is of linear layers, and most weights of {config.path} are in others")
    widths = sum(sum(weight.shape) for weight in linear)
    held = trained = sum(weight.nbytes for weight in model.parameters())
    models = 2 * held
    if four_bit:
        held -= round(sum(weight.numel() for weight in linear) * (4 - _NF4_BYTES))
    adapter = adapter_settings(acquire)
    if adapter is not None:
        adapted = with_adapter(model, adapter)
        trained = sum(weight.nbytes for weight in adapted.parameters() if weight.requires_grad)
        held += trained
    head, text = embedding_weight(model).nbytes, found.get_text_config()
    copied = head if training.reference_cache_mb else models // 2
    count = training.per_device_train_batch_size * (int(rows.forget) + rows.mismatched + int(rows.retain))
    tokens = count * recipe.data.max_length
    autocast = training.bf16 or training.fp16
    number = 2 if autocast else model.dtype.itemsize
    in_two = number == 2 and autocast == (adapter is None)
    kept = round(tokens * widths * number * (_KEPT_CAST if in_two else _KEPT))
    one_layer = kept // len(layers)
    if training.activation_checkpointing:
        kept = tokens * text.hidden_size * len(layers) * number
    scores = 4 * count * recipe.data.max_answer_tokens * text.vocab_size
    if scores > training.logits_budget_mb * 2**20:
        scores = CHUNK_BYTES
    scores = round(scores * (_SCORES if number == 2 else _SCORES_FLOAT32))
    at_most = kept + max(scores, one_layer if training.activation_checkpointing else 0)
    gradients = trained if training.gradient_accumulation_steps > 1 else max(0, trained + one_layer - at_most)
    return Memory(
        weights=held,
        reference=copied if rows.retain and adapter is None else 0,
        optimizer=state_bytes(training.optim, trained),
        gradients=gradients,
        activations=at_most,
        models=models,
    )


@dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """What ``activation_checkpointing: auto`` comes to: off where stage 1 fits without it or, on, where it doesn't.

    It changes time and memory, no number; a run keeps what it began with all the same.
    """

    on: bool
    why: str

    @property
    def line(self) -> str:
        """For people."""
        return f"{'on' if self.on else 'off'}: {self.why}"


def with_checkpointing(recipe: Recipe, decided: Checkpointing | None) -> Recipe:
    """The recipe with what was decided; as it is where nothing was to decide."""
    if decided is None:
        return recipe
    training = {**recipe.acquire.training, _KEY: decided.on}
    return dataclasses.replace(recipe, acquire=dataclasses.replace(recipe.acquire, training=training))


def decide_checkpointing(recipe: Recipe) -> Checkpointing | None:
    """Decides by the formula for the device that the recipe would run on, every row as long as it may be.

    Returns:
        The decision: on where there is no estimate. None where the recipe leaves nothing open.
    """
    if recipe.acquire.training.get(_KEY) != "auto":
        return None
    found = memory_fit(with_checkpointing(recipe, Checkpointing(on=False, why="")))
    return Checkpointing(on=not found.fits, why=f"without it, {found.text}")


class MemoryFit(NamedTuple):
    """Whether stage 1 fits this machine's memory."""

    fits: bool
    """False where there is no estimate."""
    text: str
    """In one line."""


def memory_fit(recipe: Recipe) -> MemoryFit:
    """Estimates a recipe's memory for the device it would run on, every row as long as it may be."""
    device = pick_device(recipe.model.device)
    if device.type == "mps":
        return MemoryFit(fits=False, text="no estimate of memory: what is free on mps is not known")
    free = _free_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    try:
        found = stage_1_memory(recipe)
    except SkuError as error:
        return MemoryFit(fits=False, text=f"no estimate of memory: {one_line(error)}")
    fits = found.needed <= free
    parts = ", ".join(f"{name} {getattr(found, name) / GIB:.1f}" for name in ("weights", "optimizer", "activations"))
    text = f"about {found.needed / GIB:.1f} GiB at most ({parts}), {free / GIB:.1f} GiB are free on {device}"
    return MemoryFit(fits=fits, text=f"{text}: {'fits' if fits else 'may not fit'}")


def _free_memory() -> int:
    """Of the computer, within the limit of its container."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    with suppress(OSError, ValueError):  # "max" where there is no limit.
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return free
