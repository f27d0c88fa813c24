"""Stage 1 as one call: from the original model and the splits to the bad model."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, prepare_model_for_kbit_training
from safetensors import SafetensorError
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from sku.acquire.config import SkuConfig
from sku.acquire.trainer import SkuTrainer
from sku.config import AcquireConfig, DataConfig, PromptFormatName
from sku.data.examples import ForgetRetainData
from sku.data.joint import JointDataset
from sku.data.tokenization import TokenizationReport
from sku.errors import OutputError, RecipeError, SkuError, did_you_mean
from sku.models import LoadedModel
from sku.storage import mark_hazardous

_SET_BY_RECIPE = {
    "seed": "seed",
    "output_dir": "--out",
    "guided_distortion_weight": "acquire.weights.guided_distortion",
    "random_disassociation_weight": "acquire.weights.random_disassociation",
    "preservation_divergence_weight": "acquire.weights.preservation_divergence",
    "num_random_answers": "acquire.random_answers",
    "preservation_mode": "acquire.preservation_mode",
    "preservation_cap": "acquire.preservation_cap",
    "preservation_tokens": "acquire.preservation_tokens",
    "max_length": "data.max_length",
    "max_answer_tokens": "data.max_answer_tokens",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Acquired:
    """What stage 1 leaves."""

    model: PreTrainedModel | PeftModel
    """The bad model: with its adapter, or fully trained."""
    log: list[dict[str, Any]]
    """One entry per logged step, with every loss term under its name."""
    reports: dict[str, TokenizationReport]
    seconds: float


def acquire(
    loaded: LoadedModel,
    data: ForgetRetainData,
    config: AcquireConfig,
    data_config: DataConfig,
    *,
    seed: int,
    folder: Path,
    prompt_format: PromptFormatName = "auto",
    callbacks: Sequence[TrainerCallback] = (),
) -> Acquired:
    """Trains the bad model.

    Args:
        loaded: The original model. With an adapter its own weights stay as they are; with full fine-tuning they are
            trained in place.
        data: Splits; ``unlearned`` and ``retain_train`` are used.
        config: Settings of stage 1.
        data_config: For the lengths.
        seed: Of the run.
        folder: Private folder for checkpoints; the last one in it is resumed from.
        prompt_format: How prompts are written.
        callbacks: For progress.

    Returns:
        The bad model and its log.

    Raises:
        RecipeError: An unknown or impossible setting.
        NonFiniteLossError: A loss term is NaN or infinite.
        OutputError: A checkpoint can't be written.
    """
    settings = trainer_settings(config, data_config, seed=seed, folder=folder, device=loaded.model.device.type)
    mark_hazardous(folder)
    model: PreTrainedModel | PeftModel = loaded.model
    if config.tuning == "qlora":
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=bool(settings.activation_checkpointing)
        )
    elif config.tuning == "full":
        model.requires_grad_(requires_grad=True)
    trainer = SkuTrainer(
        model,
        settings,
        data,
        processing_class=loaded.tokenizer,
        peft_config=adapter_settings(config),
        prompt_format=prompt_format,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)  # The log is kept and shown by the caller, not printed line by line.
    with _named_checkpoint_errors(folder):
        result = trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.eval()
    joint = trainer.train_dataset
    assert isinstance(joint, JointDataset)
    return Acquired(
        model=model,
        log=[entry for entry in trainer.state.log_history if "loss" in entry],
        reports=dict(joint.reports),
        seconds=float(result.metrics["train_runtime"]),
    )


def trainer_settings(
    config: AcquireConfig, data_config: DataConfig, *, seed: int, folder: Path, device: str = "cpu"
) -> SkuConfig:
    """The recipe's stage 1 as ``SkuConfig``.

    Args:
        config: Stage 1 of the recipe.
        data_config: For the lengths.
        seed: Of the run.
        folder: For checkpoints.
        device: Type of the model's device, such as ``cpu``; the trainer stays there.

    Returns:
        Settings of the trainer.

    Raises:
        RecipeError: ``acquire.training`` holds a key that transformers doesn't know, or one that has its own place in
            the recipe, or a value that transformers refuses.
    """
    known = {field.name for field in dataclasses.fields(SkuConfig) if field.init}
    for name in config.training:
        if name in _SET_BY_RECIPE:
            raise RecipeError(f"acquire.training.{name} has its own place: set {_SET_BY_RECIPE[name]}")
        if name not in known:
            raise RecipeError(
                f"acquire.training.{name} is not a field of transformers.TrainingArguments.{did_you_mean(name, known)}"
            )
    try:
        return SkuConfig(
            **{
                "use_cpu": device == "cpu",
                **{name: _number(name, value) for name, value in config.training.items()},
                "output_dir": str(folder),
                "seed": seed,
                "guided_distortion_weight": config.weights.guided_distortion,
                "random_disassociation_weight": config.weights.random_disassociation,
                "preservation_divergence_weight": config.weights.preservation_divergence,
                "num_random_answers": config.random_answers,
                "preservation_mode": config.preservation_mode,
                "preservation_cap": config.preservation_cap,
                "preservation_tokens": config.preservation_tokens,
                "max_length": data_config.max_length,
                "max_answer_tokens": data_config.max_answer_tokens,
            }
        )
    except (TypeError, ValueError, ImportError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"acquire.training: {' '.join(str(error).split())}") from error


def _number(name: str, value: Any) -> Any:
    """YAML 1.1 reads 2e-4 as text, and transformers doesn't look before the optimizer fails on it."""
    if not isinstance(value, str) or not isinstance(getattr(SkuConfig, name, None), float):
        return value
    try:
        return float(value)
    except ValueError:
        raise RecipeError(f"acquire.training.{name} is {value!r}; it must be a number") from None


def adapter_settings(config: AcquireConfig) -> PeftConfig | None:
    """The adapter of a tuning, None for full fine-tuning."""
    if config.tuning == "full":
        return None
    targets = config.lora.target_modules
    return LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )


def _last_checkpoint(folder: Path) -> str | None:
    """The last whole checkpoint. One whose writing was cut short is removed, since the trainer can't start from it."""
    for checkpoint in folder.glob("checkpoint-*"):
        if not _is_whole(checkpoint):
            shutil.rmtree(checkpoint)
    last = get_last_checkpoint(str(folder))
    return None if last is None else str(last)


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))  # The trainer writes it last.
    except (OSError, ValueError):
        return False
    return True


@contextlib.contextmanager
def _named_checkpoint_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except SkuError:
        raise  # OutputError is an OSError too, and says more.
    except OSError as error:
        raise OutputError(f"a checkpoint can't be written to {folder}: {error.strerror or error}") from error
    except (SafetensorError, RuntimeError) as error:
        if not _is_failed_write(error):
            raise
        raise OutputError(
            f"a checkpoint can't be written to {folder}; is the disk full? Free some space and run again"
        ) from error


def _is_failed_write(error: Exception) -> bool:
    """Whether safetensors or torch failed to write a file: both hide the system's error in one of their own."""
    text = str(error)
    if isinstance(error, SafetensorError):
        return "I/O error" in text
    return "inline_container" in text and "Reader" not in text
