"""Settings of the training loop as transformers takes them, and what of a recipe they are made from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, Literal

import torch
from pydantic import FiniteFloat, TypeAdapter, ValidationError
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from sku.config.check import Count, NotNegative, Positive, explain
from sku.config.data import DataConfig
from sku.config.stages import Packing
from sku.errors import RecipeError, did_you_mean, one_line

_NEEDED: Mapping[str, tuple[object, str]] = {
    "remove_unused_columns": (False, "joint examples have no columns to remove"),
    "train_sampling_strategy": ("sequential", "the joint dataset shuffles by itself, seeded by epoch"),
    "save_only_model": (False, "a run resumed without optimizer and generators would not equal an uninterrupted one"),
    "dataloader_persistent_workers": (False, "workers that outlive an epoch would repeat its draws"),
    "push_to_hub": (False, "a model in training is never uploaded; sku push uploads the finished one"),
}
SET_BY_RECIPE: Mapping[str, str] = {
    "seed": "seed",
    "output_dir": "--out",
    "max_length": "data.max_length",
    "max_answer_tokens": "data.max_answer_tokens",
}
"""Field of ``UnlearningConfig`` -> the recipe's own place for it."""

_SERVICES = ("tensorboard", "trackio", "wandb")
"""Services of ``report_to`` that get curves and no weights."""
_OFF = {"", "0", "false", "no", "none", "off"}
_STATE_BYTES = {
    "adamw_torch": 8.0, "adamw_torch_fused": 8.0, "adamw_apex_fused": 8.0, "adamw_bnb_8bit": 2.0, "adamw_8bit": 2.0,
    "adamw_torch_8bit": 2.0, "adamw_torch_4bit": 1.0, "paged_adamw_8bit": 2.0, "paged_adamw_32bit": 8.0,
    "lion_32bit": 4.0, "lion_8bit": 1.0, "rmsprop": 4.0, "adagrad": 4.0, "sgd": 0.0, "adafactor": 0.1,
}  # fmt: skip
"""Optimizer of transformers -> bytes of state for each trained weight that is held in float32."""
_FULL_STATE = 8.0
"""Of one that is not known here: that of AdamW, the most there is."""


def state_bytes(optimizer: str, trained: int) -> int:
    """Of an optimizer of transformers, for so many bytes of trained weights in float32."""
    return round(trained / 4 * _STATE_BYTES.get(optimizer, _FULL_STATE))


@dataclass
class UnlearningConfig(TrainingArguments):
    """``transformers.TrainingArguments`` with the lengths and the packing of the examples, for every method.

    Fields of TrainingArguments keep their meaning. Two may also be ``auto``: ``bf16`` is then on where the machine
    computes faster in bfloat16, and ``activation_checkpointing`` as the estimate of memory says (``sku.memory``) in
    ``sku run``, ``acquire`` and ``sweep``, elsewhere on. These have other defaults: ``learning_rate`` 2e-4 (LoRA),
    ``per_device_train_batch_size`` 4, ``logging_steps`` 1, ``report_to`` none, ``save_strategy`` no,
    ``remove_unused_columns`` False, ``logging_nan_inf_filter`` False (a non-finite loss must be seen).

    Raises:
        RecipeError: A setting of transformers can't work with joint examples.
    """

    max_length: int = 512
    """Longest sequence in tokens."""
    max_answer_tokens: int = 128
    """Longest answer in tokens."""
    packing: Packing = "auto"
    """How rows go to the model. ``tree``: one row without padding, prompts shared; ``flat``: the same, not shared;
    ``padded``: rows of equal length; ``auto``: tree where the model can."""
    logits_budget_mb: float = 1024.0
    """Most MB of float32 logits made at once; losses and gradients need 5 to 10 times that. Beyond it losses are
    computed from hidden states chunk by chunk."""
    reference_cache_mb: float = 2048.0
    """Most MB of what the original model says in one pass before training, kept for all steps. Where it is more, or
    with 0, the original is asked in each step: with the adapter off, or as a second model without one."""

    bf16: Any = False
    activation_checkpointing: Any = False
    learning_rate: float = 2e-4
    per_device_train_batch_size: int = 4
    logging_steps: float = 1
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    prediction_loss_only: bool = True
    report_to: Any = "none"
    save_strategy: Any = "no"
    train_sampling_strategy: str = "sequential"
    disable_tqdm: bool | None = True

    def __post_init__(self) -> None:
        if self.bf16 == "auto":
            self.bf16 = bf16_pays(use_cpu=self.use_cpu)
        if self.activation_checkpointing == "auto":
            self.activation_checkpointing = True
        super().__post_init__()  # type: ignore[no-untyped-call]
        for name, (value, reason) in _NEEDED.items():
            if getattr(self, name) != value:
                raise RecipeError(f"{name} must be {value}: {reason}")
        for name in ("packing", "logits_budget_mb", "reference_cache_mb"):
            _number(name, name, getattr(self, name))
        check_optimizer(
            getattr(self.optim, "value", self.optim), on_gpu=torch.cuda.is_available() and not self.use_cpu
        )
        check_services(self.report_to)


def check_optimizer(optim: str, *, on_gpu: bool) -> None:
    """Refuses an optimizer of transformers whose package is missing, or that pages without a GPU to page from.

    Raises:
        RecipeError: What is missing, or what to choose.
    """
    is_torchao = optim in ("adamw_torch_8bit", "adamw_torch_4bit")
    package = "torchao" if is_torchao else "bitsandbytes" if re.search("8bit|bnb|paged", optim) else None
    if package and find_spec(package) is None:
        raise RecipeError(f"optim is {optim}, which needs a package: pip install {package}, or choose another optim")
    if "paged" in optim and not on_gpu:
        raise RecipeError(f"optim is {optim}, and there is nothing to page out without a GPU: drop the paged_ of it")


def check_services(report_to: Iterable[str]) -> None:
    """Refuses services that would fail when training begins, or get the model in training; curves may go there.

    Raises:
        RecipeError: With the setting or the variable.
    """
    for service in report_to:
        if service not in _SERVICES:
            raise RecipeError(
                f"report_to {service}: curves go to {', '.join(_SERVICES)} alone, as others may take the model in "
                f"training.{did_you_mean(service, _SERVICES)}"
            )
        if service not in get_available_reporting_integrations():
            raise RecipeError(f"report_to {service} needs a package that is missing: pip install {service}")
        if service == "wandb" and os.environ.get("WANDB_LOG_MODEL", "false").lower() not in _OFF:
            raise RecipeError("report_to wandb would upload the model in training: set WANDB_LOG_MODEL=false")


def bf16_pays(*, use_cpu: bool) -> bool:
    """Whether this machine, or with ``use_cpu`` its processor, multiplies bfloat16 faster than float32 matrices."""
    if torch.cuda.is_available() and not use_cpu:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(has_units and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def training_settings(
    training: Mapping[str, Any],
    data: DataConfig,
    *,
    seed: int,
    device: str = "cpu",
    places: Mapping[str, str] = MappingProxyType({}),
) -> UnlearningConfig:
    """A recipe's training settings as transformers takes them.

    Args:
        training: What the recipe says, under ``acquire.training`` where ``places`` doesn't tell another key.
        data: Of the recipe, for the lengths.
        seed: Of training.
        device: Type of the model's device, such as ``cpu``; the trainer stays there.
        places: Name of a setting -> key in the recipe that holds it, for messages.

    Returns:
        Settings of the trainer.

    Raises:
        RecipeError: ``training`` holds a key that transformers doesn't know, or one that has its own place in the
            recipe, or a value that transformers refuses.
    """
    known = {field.name for field in fields(UnlearningConfig) if field.init}
    where = {name: places.get(name, "acquire.training") for name in training}
    for name in training:
        if name in SET_BY_RECIPE:
            raise RecipeError(f"{where[name]}.{name} has its own place: set {SET_BY_RECIPE[name]}")
        if name not in known:
            raise RecipeError(
                f"{where[name]}.{name} is not a field of transformers.TrainingArguments.{did_you_mean(name, known)}"
            )
    try:
        return UnlearningConfig(
            **{
                "use_cpu": device == "cpu",
                **{name: _number(f"{where[name]}.{name}", name, value) for name, value in training.items()},
                "seed": seed,
                "max_length": data.max_length,
                "max_answer_tokens": data.max_answer_tokens,
            }
        )
    except (TypeError, ValueError, ImportError) as error:
        if isinstance(error, RecipeError):
            raise
        keys = " and ".join(dict.fromkeys(where.values())) or "acquire.training"
        raise RecipeError(f"{keys}: {one_line(error)}") from error


_LIMITS: Mapping[str, Any] = {
    "per_device_train_batch_size": Count, "gradient_accumulation_steps": Count, "max_steps": Literal[-1] | Count,
    "learning_rate": NotNegative, "max_grad_norm": NotNegative, "weight_decay": NotNegative,
    "warmup_steps": NotNegative, "num_train_epochs": NotNegative, "save_steps": Positive, "logging_steps": Positive,
    "packing": Packing, "logits_budget_mb": NotNegative, "reference_cache_mb": NotNegative,
}  # fmt: skip
"""What transformers and torch look at late or never, and after an evaluation of the base model at the earliest."""
_WHOLE = {field.name for field in fields(UnlearningConfig) if field.type in (int, "int")}


def _number(key: str, name: str, value: Any) -> Any:
    """YAML 1.1 reads 2e-4 as text, and transformers doesn't look before the optimizer fails on it."""
    is_float = isinstance(getattr(UnlearningConfig, name, None), float)
    kind = int if name in _WHOLE else FiniteFloat if is_float or isinstance(value, float) else Any
    try:
        number = TypeAdapter(_LIMITS.get(name, kind)).validate_python(value, strict=name in _WHOLE)
    except ValidationError as error:
        raise RecipeError(explain(error, value, key, ())) from None
    return number if isinstance(value, str) else value
