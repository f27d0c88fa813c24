"""The job that is planned, in numbers, and its weights, counted on its model without any content."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sku.config import AcquireConfig, LoraSettings, Tuning
from sku.models import plain_model, with_adapter, without_weights
from sku.plan.disk import STATE_BYTES
from sku.training.config import ReferenceMode
from sku.training.run import adapter_settings

Sharding = Literal["ddp", "fsdp2", "zero3"]
_NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Of each weight: four, an eight-bit scale for 64 weights, and a float for 256 scales (double quantization)."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One process of stage 1."""

    name: str
    """Of the model."""
    config: PreTrainedConfig
    tuning: Tuning
    lora: LoraSettings
    dtype: torch.dtype
    """The weights are held in it; those of a QLoRA base before they are quantized."""
    autocast: torch.dtype | None
    """Type of matrix products where ``acquire.training.bf16`` or ``fp16`` is on."""
    checkpointing: bool
    optimizer: str
    examples: int
    """Joint examples of one forward pass."""
    accumulation: int
    steps: int | None
    """Of both twins together, where there are two. None where the recipe counts epochs, whose length only the data
    tells."""
    forget: bool
    mismatched: int
    retain: int
    """Normal rows, with their frozen reference."""
    reference: ReferenceMode
    """How it is asked, as ``acquire.training.reference`` says."""
    row_tokens: int
    """Of each padded row."""
    answer_tokens: int
    """Positions of each row whose next token counts."""
    checkpoints: int
    """Kept on disk at once."""
    gpus: int
    sharding: Sharding
    shipped_shape: bool = False
    """The model's configuration was out of reach; that of ``shapes.json`` stands in for it."""

    @property
    def rows(self) -> int:
        """Rows of one forward pass."""
        return self.examples * (int(self.forget) + self.mismatched + self.retain)

    @property
    def state_bytes(self) -> float:
        """Bytes of optimizer state for each trained weight in float32."""
        return STATE_BYTES[self.optimizer]

    @property
    def keeps_reference(self) -> bool:
        """Whether the reference is what one pass before training left, so that no step asks it."""
        return self.retain > 0 and (self.reference == "cache" or (self.reference == "auto" and self.sharding == "ddp"))

    @property
    def copies_reference(self) -> bool:
        """Whether the reference is a second model and not the same one without its adapter."""
        return self.retain > 0 and self.tuning == "full" and not self.keeps_reference

    @property
    def copies_head(self) -> bool:
        """Whether the reference's head is kept, since that of the model is trained."""
        return self.tuning == "full" and self.keeps_reference


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
        text: Any = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None) is not None:
            text.layer_types = list(text.layer_types)[:layers]
    # Under QLoRA what is not quantized is float32, and so are the activations between four-bit layers.
    model = without_weights(config, torch.float32 if job.tuning == "qlora" else job.dtype, job.name)
    adapter = adapter_settings(AcquireConfig(tuning=job.tuning, lora=job.lora))
    return model if adapter is None else with_adapter(model, adapter)


def weights_of(job: Job) -> Weights:
    """Counts a job's weights.

    Raises:
        ModelError: As ``model_of``.
        RecipeError: As ``model_of``.
    """
    model = model_of(job)
    plain = plain_model(model)
    named = list(model.named_parameters())
    adapter = sum(parameter.numel() for name, parameter in named if "lora_" in name)
    parameters = sum(parameter.numel() for name, parameter in named if "lora_" not in name)
    trained = [parameter for _, parameter in named if parameter.requires_grad]
    bases = [module.base_layer for module in model.modules() if hasattr(module, "lora_A")]
    adapted = sum(base.weight.numel() for base in bases if isinstance(base, nn.Linear | Conv1D | nn.Embedding))
    saved = _saved_by_four_bits(plain) if job.tuning == "qlora" else 0
    return Weights(
        parameters=parameters,
        adapter=adapter,
        trainable=sum(parameter.numel() for parameter in trained),
        trainable_bytes=sum(parameter.nbytes for parameter in trained),
        held_bytes=sum(parameter.nbytes for _, parameter in named) - saved,
        unit_bytes=_unit_bytes(plain),
        adapted=adapted if adapter else parameters,
    )


def _saved_by_four_bits(plain: PreTrainedModel) -> int:
    """Bytes by which the linear layers shrink that QLoRA quantizes."""
    head = plain.get_output_embeddings()
    linear = [
        module.weight
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear) and module is not head and "lora_" not in name
    ]
    after = round(sum(weight.numel() for weight in linear) * _NF4_BITS / 8)
    return sum(weight.nbytes for weight in linear) - after


def _unit_bytes(plain: PreTrainedModel) -> int:
    containers = [module for module in plain.modules() if isinstance(module, nn.ModuleList)]
    layers = [sum(parameter.nbytes for parameter in layer.parameters()) for held in containers for layer in held]
    embeddings = (plain.get_input_embeddings(), plain.get_output_embeddings())
    weights = [getattr(module, "weight", None) for module in embeddings]
    ends = [weight.nbytes for weight in weights if isinstance(weight, torch.Tensor)]
    return sum(sorted([*layers, *ends])[-2:])
