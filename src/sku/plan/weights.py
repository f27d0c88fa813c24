"""The weights of a job, counted on its model without any content."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sku.config import AcquireConfig
from sku.models import plain_model, with_adapter, without_weights
from sku.plan.job import Job
from sku.training.run import adapter_settings

_NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Of each weight: four, an eight-bit scale for 64 weights, and a float for 256 scales (double quantization)."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How many weights there are, and how they are held."""

    parameters: int
    """Of the original model, tied ones once."""
    adapter: int
    trainable: int
    trainable_bytes: int
    held_bytes: int
    """All that lies in memory, the adapter included."""
    unit_bytes: int
    """The two largest parts that sharding gathers one at a time: a layer and the next, or embedding or head."""
    adapted: int
    """Weights that the adapter changes, or all."""


def model_of(job: Job, layers: int | None = None) -> PreTrainedModel | PeftModel:
    """The model of a job on the ``meta`` device, as it is trained.

    Args:
        job: Says what is trained.
        layers: Number of decoder layers; that of the configuration if None.

    Returns:
        The model, with its adapter where there is one.

    Raises:
        ModelError: transformers has no such architecture.
        RecipeError: The adapter doesn't fit.
    """
    config = copy.deepcopy(job.config)
    if layers is not None:
        _shorten(config.get_text_config(), layers)
    model = without_weights(config, _computed_dtype(job), job.name)
    adapter = adapter_settings(AcquireConfig(tuning=job.tuning, lora=job.lora))
    return model if adapter is None else with_adapter(model, adapter)


def weights_of(job: Job) -> Weights:
    """Counts a job's weights.

    Raises:
        ModelError: As ``model_of``.
        RecipeError: As ``model_of``.
    """
    model = model_of(job)
    original = {id(parameter): parameter for name, parameter in model.named_parameters() if "lora_" not in name}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    four_bit = _four_bit_bytes(job, model)
    held = sum(parameter.nbytes for parameter in model.parameters())
    adapter = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
    return Weights(
        parameters=sum(parameter.numel() for parameter in original.values()),
        adapter=adapter,
        trainable=sum(parameter.numel() for parameter in trained),
        trainable_bytes=sum(parameter.nbytes for parameter in trained),
        held_bytes=held - four_bit[0] + four_bit[1],
        unit_bytes=_unit_bytes(model),
        adapted=_adapted(model) if adapter else sum(parameter.numel() for parameter in original.values()),
    )


def _computed_dtype(job: Job) -> torch.dtype:
    """Under QLoRA what is not quantized is float32, and so are the activations between four-bit layers."""
    return torch.float32 if job.tuning == "qlora" else job.dtype


def _shorten(config: PreTrainedConfig, layers: int) -> None:
    config.num_hidden_layers = layers
    kinds: Any = getattr(config, "layer_types", None)
    if kinds is not None:
        config.layer_types = list(kinds)[:layers]


def _four_bit_bytes(job: Job, model: nn.Module) -> tuple[int, int]:
    """Bytes of the linear layers that QLoRA quantizes: before and after."""
    if job.tuning != "qlora":
        return 0, 0
    plain = plain_model(model)  # type: ignore[arg-type]
    head = plain.get_output_embeddings()
    linear = [
        module.weight
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear) and module is not head and "lora_" not in name
    ]
    return sum(weight.nbytes for weight in linear), round(sum(weight.numel() for weight in linear) * _NF4_BITS / 8)


def _unit_bytes(model: nn.Module) -> int:
    plain = plain_model(model)  # type: ignore[arg-type]
    layers = [
        sum(parameter.nbytes for parameter in layer.parameters())
        for container in plain.modules()
        if isinstance(container, nn.ModuleList)
        for layer in container
    ]
    ends: list[int] = []
    for module in (plain.get_input_embeddings(), plain.get_output_embeddings()):
        weight = None if module is None else module.weight
        if isinstance(weight, torch.Tensor):
            ends.append(weight.nbytes)
    return sum(sorted([*layers, *ends])[-2:])


def _adapted(model: nn.Module) -> int:
    """Weights of the layers that carry an adapter."""
    bases = [module.base_layer for module in model.modules() if hasattr(module, "lora_A")]
    return sum(base.weight.numel() for base in bases if isinstance(base, nn.Linear | Conv1D | nn.Embedding))
