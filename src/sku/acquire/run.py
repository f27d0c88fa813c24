"""Stage 1 as one call: from the original model and the splits to the bad model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback

from sku.acquire.config import SkuConfig
from sku.acquire.objective import sku_objective
from sku.config import AcquireConfig, CompatConfig, DataConfig, PromptFormatName, Twin
from sku.data.examples import ForgetRetainData
from sku.models import LoadedModel
from sku.storage import mark_hazardous
from sku.training.config import SET_BY_RECIPE, training_settings
from sku.training.run import Trained, adapter_settings, train

MODULES_SET_BY_RECIPE = {
    **SET_BY_RECIPE,
    "guided_distortion_weight": "acquire.weights.guided_distortion",
    "random_disassociation_weight": "acquire.weights.random_disassociation",
    "preservation_divergence_weight": "acquire.weights.preservation_divergence",
    "num_random_answers": "acquire.random_answers",
    "preservation_mode": "acquire.preservation_mode",
    "preservation_cap": "acquire.preservation_cap",
    "preservation_tokens": "acquire.preservation_tokens",
    "preservation_at": "acquire.preservation_at",
    "normal_per_harmful": "acquire.normal_per_harmful",
    "train_twin": "acquire.twin",
    "depth_share": "acquire.depth_share",
    "depth_tokens": "acquire.depth_tokens",
}
"""Field of ``SkuConfig`` -> the recipe's own place for it."""


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
    compat: CompatConfig | None = None,
    twin: Twin = "bad",
) -> Trained[PreTrainedModel | PeftModel]:
    """Trains the bad model, or the good twin: one model a call (``sku.methods.twins`` trains both).

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
        compat: Behaviours of the public code to reproduce; None for none. ``row_split`` is a matter of the data.
        twin: Which model is trained.

    Returns:
        The model and its log.

    Raises:
        RecipeError: An unknown or impossible setting.
        NonFiniteLossError: A loss term is NaN or infinite.
        OutputError: A checkpoint can't be written.
    """
    settings = trainer_settings(
        config, data_config, seed=seed, folder=folder, device=loaded.model.device.type, twin=twin
    )
    mark_hazardous(folder)
    return train(
        loaded,
        data,
        sku_objective(config, compat, twin=twin),
        settings,
        tuning=config.tuning,
        adapter=adapter_settings(config),
        folder=folder,
        prompt_format=prompt_format,
        callbacks=callbacks,
        hazardous=True,
    )


def trainer_settings(
    config: AcquireConfig,
    data_config: DataConfig,
    *,
    seed: int,
    folder: Path,
    device: str = "cpu",
    twin: Twin = "bad",
) -> SkuConfig:
    """The recipe's stage 1 as ``SkuConfig``.

    Args:
        config: Stage 1 of the recipe.
        data_config: For the lengths.
        seed: Of the run.
        folder: For checkpoints.
        device: Type of the model's device, such as ``cpu``; the trainer stays there.
        twin: Which model is trained.

    Returns:
        Settings of the trainer.

    Raises:
        RecipeError: ``acquire.training`` holds a key that transformers doesn't know, or one that has its own place in
            the recipe, or a value that transformers refuses.
    """
    return training_settings(
        SkuConfig,
        config.training,
        {
            "output_dir": str(folder),
            "seed": seed,
            "guided_distortion_weight": config.weights.guided_distortion,
            "random_disassociation_weight": config.weights.random_disassociation,
            "preservation_divergence_weight": config.weights.preservation_divergence,
            "num_random_answers": config.random_answers,
            "preservation_mode": config.preservation_mode,
            "preservation_cap": config.preservation_cap,
            "preservation_tokens": config.preservation_tokens,
            "preservation_at": config.preservation_at,
            "normal_per_harmful": config.normal_per_harmful,
            "train_twin": twin,
            "depth_share": config.depth_share,
            "depth_tokens": config.depth_tokens,
            "max_length": data_config.max_length,
            "max_answer_tokens": data_config.max_answer_tokens,
        },
        set_by_recipe=MODULES_SET_BY_RECIPE,
        device=device,
    )
