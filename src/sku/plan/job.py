"""A recipe's job of stage 1 in numbers, and its weights, counted on its model without any content."""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sku.acquire.objective import sku_objective
from sku.config.data import ModelConfig
from sku.config.recipe import Recipe
from sku.config.stages import AcquireConfig, LoraSettings, Tuning
from sku.errors import ModelError, RecipeError
from sku.methods.run import resolve_method, with_safe_dtype
from sku.models import load_config, plain_model, with_adapter, without_weights
from sku.training.config import ReferenceMode, UnlearningConfig, check_optimizer
from sku.training.run import adapter_settings

Sharding = Literal["ddp", "fsdp2", "zero3"]
STATE_BYTES = {
    "adamw_torch": 8.0, "adamw_torch_fused": 8.0, "adamw_apex_fused": 8.0, "adamw_bnb_8bit": 2.0, "adamw_8bit": 2.0,
    "adamw_torch_8bit": 2.0, "adamw_torch_4bit": 1.0, "paged_adamw_8bit": 2.0, "paged_adamw_32bit": 8.0,
    "lion_32bit": 4.0, "lion_8bit": 1.0, "rmsprop": 4.0, "adagrad": 4.0, "sgd": 0.0, "adafactor": 0.1,
}  # fmt: skip
"""Optimizer of transformers -> bytes of state for each trained weight that is held in float32."""
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


def disk_bytes(*, trained: int, state_bytes: float, checkpoints: int, adapter: bool, model: int) -> int:
    """What lies on the disk at the fullest moment of a run.

    Checkpoints hold what is trained and its optimizer; beside them lie the trained and the unlearned weights.

    Args:
        trained: Bytes of the trained weights.
        state_bytes: Of the optimizer for each trained weight in float32.
        checkpoints: That lie there at once.
        adapter: Whether an adapter is trained, which is saved negated too.
        model: Bytes of the unlearned model.

    Returns:
        Bytes.
    """
    checkpoint = trained + round(trained / 4 * state_bytes)
    return checkpoints * checkpoint + trained + (trained if adapter else 0) + model


def checkpoints_at_once(training: UnlearningConfig) -> int:
    """Most checkpoints that lie on the disk together: the next one is written before the oldest is deleted."""
    return 0 if training.save_strategy == "no" else (training.save_total_limit or 0) + 1


def job_of(
    recipe: Recipe,
    *,
    gpus: int = 1,
    sharding: Sharding = "ddp",
    row_tokens: int | None = None,
    answer_tokens: int | None = None,
    on_cpu: bool = False,
) -> Job:
    """The job that a recipe describes; by default rows are as long as they may be.

    ``sharding`` says what the processes, each with a GPU of its own, divide: nothing, or weights, gradients and
    optimizer. With ``on_cpu`` weights have the type that ``auto`` means on a CPU.

    Raises:
        RecipeError: Another method, an unknown optimizer, or numbers that make no sense.
        ModelError: The model's configuration can't be read.
    """
    if recipe.method != "sku":
        raise RecipeError(f"sku plan knows stage 1 of sku, and the recipe's method is {recipe.method}")
    row_tokens = recipe.data.max_length if row_tokens is None else row_tokens
    answer_tokens = min(recipe.data.max_answer_tokens, row_tokens) if answer_tokens is None else answer_tokens
    if gpus < 1 or not 1 <= answer_tokens <= row_tokens:
        raise RecipeError(
            f"{gpus} GPUs, rows of {row_tokens} tokens with {answer_tokens} of the answer can't be planned: all must "
            "be 1 or more, and the answer is a part of its row"
        )
    training, optimizer = _training_and_optimizer(recipe, on_cpu=on_cpu)
    objective = sku_objective(recipe.acquire)
    config, shipped = _config_of(recipe.model)
    model = with_safe_dtype(recipe)
    if model.dtype == "auto":
        dtype = torch.float32 if on_cpu else torch.bfloat16
    elif model.dtype == "stored":
        dtype = getattr(config, "dtype", None) or torch.float32
    else:
        dtype = getattr(torch, model.dtype)
    return Job(
        name=recipe.model.path,
        config=config,
        tuning=recipe.acquire.tuning,
        lora=recipe.acquire.lora,
        dtype=dtype,
        autocast=torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None,
        checkpointing=bool(training.activation_checkpointing),
        optimizer=optimizer,
        examples=training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        steps=training.max_steps * (2 if recipe.acquire.twin == "good" else 1) if training.max_steps > 0 else None,
        forget=objective.rows.forget,
        mismatched=objective.rows.mismatched,
        retain=objective.rows.retain,
        reference=training.reference,
        row_tokens=row_tokens,
        answer_tokens=answer_tokens,
        checkpoints=checkpoints_at_once(training),
        gpus=gpus,
        sharding=sharding,
        shipped_shape=shipped,
    )


def _config_of(model: ModelConfig) -> tuple[PreTrainedConfig, bool]:
    """Of the model's own files; where they are out of reach, the shape that this package knows of the recipes' models.

    Returns:
        The configuration, and whether it is the shipped shape.
    """
    try:
        return load_config(model), False
    except ModelError:
        shapes = json.loads((resources.files("sku") / "plan" / "shapes.json").read_text(encoding="utf-8"))
        shape = shapes.get(model.path)
        if shape is None:
            raise
        return AutoConfig.for_model(**shape), True


def _training_and_optimizer(recipe: Recipe, *, on_cpu: bool) -> tuple[UnlearningConfig, str]:
    """The trainer's settings, made as on a CPU: the GPU that is planned for may be another machine's."""
    settings = dict(recipe.acquire.training)
    optim = str(settings.get("optim"))
    paged = optim.startswith("paged_") and not on_cpu
    if paged:  # Refused without a GPU.
        del settings["optim"]
    if settings.get("bf16") == "auto" and not on_cpu:
        settings["bf16"] = True
    acquire = dataclasses.replace(recipe.acquire, training=settings)
    training = resolve_method(dataclasses.replace(recipe, acquire=acquire), Path("planned"), device="cpu").training
    if paged:
        check_optimizer(optim, on_gpu=True)
    else:
        optim = str(getattr(training.optim, "value", training.optim))
    if optim not in STATE_BYTES:
        raise RecipeError(
            f"the memory of acquire.training.optim={optim} is not known here; known: {', '.join(sorted(STATE_BYTES))}"
        )
    return training, optim
