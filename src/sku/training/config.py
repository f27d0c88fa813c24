"""Settings of the training loop as transformers takes them, and what of a recipe they are made from."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, get_args

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from sku.config.stages import Packing
from sku.errors import RecipeError, did_you_mean, one_line

_NEEDED: Mapping[str, tuple[object, str]] = {
    "remove_unused_columns": (False, "joint examples have no columns to remove"),
    "train_sampling_strategy": ("sequential", "the joint dataset shuffles by itself, seeded by epoch"),
    "save_only_model": (False, "a run resumed without optimizer and generators would not equal an uninterrupted one"),
    "dataloader_persistent_workers": (False, "workers that outlive an epoch would repeat its draws"),
}
SET_BY_RECIPE: Mapping[str, str] = {
    "seed": "seed",
    "output_dir": "--out",
    "max_length": "data.max_length",
    "max_answer_tokens": "data.max_answer_tokens",
}
"""Field of ``UnlearningConfig`` -> the recipe's own place for it."""

MODEL_UPLOADS: Mapping[str, tuple[str, str]] = {
    "wandb": ("WANDB_LOG_MODEL", "false"),
    "comet_ml": ("COMET_LOG_ASSETS", "false"),
    "mlflow": ("HF_MLFLOW_LOG_ARTIFACTS", "false"),
    "dagshub": ("HF_DAGSHUB_LOG_ARTIFACTS", "false"),
    "clearml": ("CLEARML_LOG_MODEL", "true"),
    "dvclive": ("HF_DVCLIVE_LOG_MODEL", "false"),
    "swanlab": ("SWANLAB_LOG_MODEL", "false"),
}
"""Service of ``report_to`` -> the variable that makes transformers send it checkpoints, and what holds without it."""
ALWAYS_UPLOADS = ("flyte",)
"""Services that get every checkpoint and have no switch."""
_PACKAGES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml", "kubeflow": "kubeflow"}
"""Service -> its package where that is named otherwise."""
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
    logits_budget_mb: float | None = 1024.0
    """Most MB of float32 logits made at once; losses and gradients need 5 to 10 times that. Beyond it losses are
    computed from hidden states chunk by chunk; None: no limit."""
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
        if self.packing not in get_args(Packing):
            raise RecipeError(f"packing is {self.packing!r}; it must be one of {', '.join(get_args(Packing))}")
        for name in ("logits_budget_mb", "reference_cache_mb"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise RecipeError(f"{name} is {value}; it must be 0 or more")
        check_optimizer(
            getattr(self.optim, "value", self.optim), on_gpu=torch.cuda.is_available() and not self.use_cpu
        )
        check_services(self.report_to)
        check_no_uploads(self.report_to, push_to_hub=self.push_to_hub)


def check_optimizer(optim: str, *, on_gpu: bool) -> None:
    """Refuses an optimizer of transformers whose package is missing, or that pages without a GPU to page from.

    Raises:
        RecipeError: What is missing, or what to choose.
    """
    package = None
    if optim in ("adamw_torch_8bit", "adamw_torch_4bit"):
        package = "torchao"
    elif any(part in optim for part in ("8bit", "bnb", "paged")):
        package = "bitsandbytes"
    if package and find_spec(package) is None:
        wanted = '"sku-unlearning[gpu]"' if package == "bitsandbytes" else package
        raise RecipeError(
            f"optim is {optim}, which needs the package {package}: pip install {wanted}, or choose another optim"
        )
    if "paged" in optim and not on_gpu:
        raise RecipeError(f"optim is {optim}, and there is nothing to page out without a GPU: drop the paged_ of it")


def check_services(report_to: Iterable[str]) -> None:
    """Refuses services that would fail when training begins, which may be long after the start of a run.

    Raises:
        RecipeError: transformers doesn't know one, or its package is missing.
    """
    available = get_available_reporting_integrations()
    for service in report_to:
        if service not in INTEGRATION_TO_CALLBACK:
            raise RecipeError(
                f"report_to {service} is not a service that transformers knows."
                f"{did_you_mean(service, INTEGRATION_TO_CALLBACK)} Known: {', '.join(INTEGRATION_TO_CALLBACK)}"
            )
        if service not in available and service not in ALWAYS_UPLOADS:
            raise RecipeError(
                f"report_to {service} needs a package that is missing: pip install {_PACKAGES.get(service, service)}"
            )


def check_no_uploads(report_to: Iterable[str], *, push_to_hub: bool) -> None:
    """Refuses settings under which transformers uploads the model while it is trained; curves may go there.

    Raises:
        RecipeError: With the setting or the variable.
    """
    if push_to_hub:
        raise RecipeError(
            "push_to_hub must be False: a model in training is never uploaded; sku push uploads the finished one"
        )
    for service in report_to:
        if service in ALWAYS_UPLOADS:
            raise RecipeError(f"report_to {service} uploads every checkpoint of the model in training: leave it out")
        if service in MODEL_UPLOADS:
            variable, default = MODEL_UPLOADS[service]
            value = os.environ.get(variable, default)
            if value.lower() not in _OFF:
                raise RecipeError(
                    f"report_to {service} would upload the model in training ({variable} is {value}): "
                    f"set {variable}=false, so that only its curves go there"
                )


def bf16_pays(*, use_cpu: bool) -> bool:
    """Whether this machine, or with ``use_cpu`` its processor, multiplies bfloat16 faster than float32 matrices."""
    if torch.cuda.is_available() and not use_cpu:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(has_units and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def training_settings(
    training: Mapping[str, Any],
    fixed: Mapping[str, Any],
    *,
    device: str = "cpu",
    places: Mapping[str, str] = MappingProxyType({}),
) -> UnlearningConfig:
    """A recipe's training settings as transformers takes them.

    Args:
        training: What the recipe says, under ``acquire.training`` where ``places`` doesn't tell another key.
        fixed: Fields that the recipe has its own places for.
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
                **fixed,
            }
        )
    except (TypeError, ValueError, ImportError) as error:
        if isinstance(error, RecipeError):
            raise
        keys = " and ".join(dict.fromkeys(where.values())) or "acquire.training"
        raise RecipeError(f"{keys}: {one_line(error)}") from error


_AT_LEAST: Mapping[str, float] = {
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": -1, "learning_rate": 0,
    "max_grad_norm": 0, "weight_decay": 0, "warmup_steps": 0, "num_train_epochs": 0,
}  # fmt: skip
"""What transformers and torch look at late or never, and after an evaluation of the base model at the earliest."""
_ABOVE_0 = ("save_steps", "logging_steps")
_WHOLE = {field.name for field in fields(UnlearningConfig) if field.type in (int, "int")}


def _number(key: str, name: str, value: Any) -> Any:
    """YAML 1.1 reads 2e-4 as text, and transformers doesn't look before the optimizer fails on it."""
    if isinstance(value, str) and isinstance(getattr(UnlearningConfig, name, None), float):
        try:
            value = float(value)
        except ValueError:
            raise RecipeError(f"{key} is {value!r}; it must be a number") from None
    if name in _WHOLE and (not isinstance(value, int) or isinstance(value, bool)):
        raise RecipeError(f"{key} is {value!r}; it must be a whole number")
    if not isinstance(value, int | float):
        return value
    if not math.isfinite(value):
        raise RecipeError(f"{key} is {value}; it must be a finite number")
    if not value >= _AT_LEAST.get(name, value) or (name == "max_steps" and value == 0):
        least = "1 or more, or -1 for whole epochs" if name == "max_steps" else f"{_AT_LEAST[name]} or more"
        raise RecipeError(f"{key} is {value}; it must be {least}")
    if name in _ABOVE_0 and not value > 0:
        raise RecipeError(f"{key} is {value}; it must be above 0")
    return value
