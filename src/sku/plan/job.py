"""From a recipe to the job that is planned: the step of stage 1 that decides memory and time."""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig

from sku.acquire.objective import sku_objective
from sku.config import ModelConfig, Recipe
from sku.errors import ModelError, RecipeError
from sku.methods.run import prepare, with_safe_dtype
from sku.models import load_config
from sku.plan.disk import STATE_BYTES, checkpoints_at_once
from sku.plan.weights import Job, Sharding
from sku.training.config import UnlearningConfig
from sku.training.optimizer import check_optimizer


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
    training = prepare(dataclasses.replace(recipe, acquire=acquire), Path("planned"), device="cpu").training
    if paged:
        check_optimizer(optim, stochastic_rounding=training.stochastic_rounding, on_gpu=True)
    else:
        optim = str(getattr(training.optim, "value", training.optim))
    if optim not in STATE_BYTES:
        raise RecipeError(
            f"the memory of acquire.training.optim={optim} is not known here; known: {', '.join(sorted(STATE_BYTES))}"
        )
    return training, optim
