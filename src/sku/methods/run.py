"""One method, from the original model to the change it makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from sku.acquire.objective import sku_objective
from sku.config import AcquireConfig, MethodConfig, ModelConfig, Recipe, Twin, settings_from_dict
from sku.data.examples import ForgetRetainData
from sku.data.joint import check_fits
from sku.errors import RecipeError, did_you_mean
from sku.methods import METHODS, method_named
from sku.methods.base import AnyMethod
from sku.methods.twins import TWINS, train_twins
from sku.models import LoadedModel, pick_device
from sku.negate.operators import PreparedOperator, prepare_operators
from sku.negate.operators.base import OperatorContext, context_of
from sku.negate.task_vector import TaskVector
from sku.storage import mark_hazardous
from sku.training.config import UnlearningConfig, training_settings
from sku.training.objective import Objective
from sku.training.run import Trained, adapter_settings, train


@dataclass(frozen=True, kw_only=True)
class MethodRun:
    """A recipe's method with all that it needs to know, checked before anything is loaded."""

    method: AnyMethod
    settings: Any
    """Of ``method.settings``."""
    strength: float
    """theta_u = theta_o + strength * delta; the alpha of the methods that negate, 1 where a run is to choose it."""
    training: UnlearningConfig
    operators: tuple[PreparedOperator, ...] = ()
    """Applied to SKU's vector before it is subtracted; other methods have none."""


def prepare(recipe: Recipe, folder: Path, *, device: str | None = None) -> MethodRun:
    """Reads and checks a recipe's settings for its method.

    Args:
        recipe: ``method`` says which.
        folder: For checkpoints.
        device: Type of the model's device, such as ``cpu``; the trainer stays there. None: what ``model.device``
            stands for.

    Returns:
        All that ``train_method`` needs.

    Raises:
        RecipeError: An unknown method, also under ``methods``, or an unknown or impossible setting.
        ModelError: The machine has no such device.
    """
    method = method_named(recipe.method)
    names = [*(known.name for known in METHODS), method.name]
    for name in recipe.methods:
        if name not in names:
            raise RecipeError(f"methods.{name} is not a method.{did_you_mean(name, names)} Known: {', '.join(names)}")
        if name == "sku":
            raise RecipeError("methods.sku has its own place: SKU's settings are acquire and negate")
    own = recipe.methods.get(method.name, MethodConfig())
    is_sku = method.settings is AcquireConfig
    settings = (
        recipe.acquire
        if is_sku
        else settings_from_dict(
            method.settings, own.settings, f"methods.{method.name}.settings", f"recipe {recipe.name}"
        )
    )
    training = training_settings(
        UnlearningConfig,
        {**recipe.acquire.training, **own.training},
        {
            "output_dir": str(folder),
            "seed": recipe.seed if recipe.acquire.seed is None else recipe.acquire.seed,
            "max_length": recipe.data.max_length,
            "max_answer_tokens": recipe.data.max_answer_tokens,
        },
        device=pick_device(recipe.model.device).type if device is None else device,
        places=dict.fromkeys(own.training, f"methods.{method.name}.training"),
    )
    if is_sku and recipe.acquire.twin == "good" and training.world_size > 1:
        raise RecipeError(
            "acquire.twin good trains two models in one process: start it without a launcher, or set acquire.twin=none"
        )
    return MethodRun(
        method=method,
        settings=settings,
        strength=recipe.negate.given_alpha if is_sku else own.strength,
        training=training,
        operators=prepare_operators(recipe.negate.operators, f"recipe {recipe.name}") if is_sku else (),
    )


def train_method(
    recipe: Recipe,
    loaded: LoadedModel,
    data: ForgetRetainData,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trained[PreTrainedModel | PeftModel | TaskVector]:
    """Trains a recipe's method; both twins where ``acquire.twin`` is ``good``.

    Args:
        recipe: ``method`` says which.
        loaded: The original model. With an adapter its own weights stay as they are; with full fine-tuning they are
            trained in place.
        data: Splits; ``forget_train`` and ``retain_train`` are used.
        folder: Private folder for checkpoints; the last one in it is resumed from.
        callbacks: For progress.

    Returns:
        The trained model and its log; of twins their difference (``train_twins``).

    Raises:
        DataError: The data lacks rows that the method needs.
        RecipeError: An unknown or impossible setting.
        NonFiniteLossError: A loss term is NaN or infinite.
        OutputError: A checkpoint can't be written.
    """
    run = prepare(recipe, folder, device=loaded.model.device.type)
    method = run.method
    # Checkpoints of every method are kept private: they lie beside data that is not for everyone.
    if method.hazardous:
        mark_hazardous(folder)
    else:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not has_twins(recipe):
        return _train(recipe, run, method.objective(run.settings, loaded.model), loaded, data, folder, callbacks)

    def train_one(twin: Twin, original: LoadedModel, place: Path) -> Trained[PreTrainedModel | PeftModel]:
        mark_hazardous(place)
        own = prepare(recipe, place, device=original.model.device.type)
        return _train(recipe, own, sku_objective(recipe.acquire, twin=twin), original, data, place, callbacks)

    four_bit = recipe.acquire.tuning == "qlora"
    return train_twins(loaded, with_safe_dtype(recipe), folder, recipe.negate.twin, train_one, four_bit=four_bit)


def check_rows(recipe: Recipe, data: ForgetRetainData) -> None:
    """Refuses data that stage 1 of SKU can't train on, before anything is evaluated or trained: ``check_fits``.

    Args:
        recipe: ``acquire`` says what is trained on.
        data: The splits.

    Raises:
        DataError: Refusals are missing, or framings don't go with the data.
    """
    if method_named(recipe.method).settings is not AcquireConfig:
        return
    for twin in TWINS if has_twins(recipe) else TWINS[:1]:
        check_fits(data, sku_objective(recipe.acquire, twin=twin).rows)


def has_twins(recipe: Recipe) -> bool:
    """Whether stage 1 trains a good twin beside the bad model."""
    return method_named(recipe.method).settings is AcquireConfig and recipe.acquire.twin == "good"


def _train(
    recipe: Recipe,
    run: MethodRun,
    objective: Objective,
    loaded: LoadedModel,
    data: ForgetRetainData,
    folder: Path,
    callbacks: Sequence[TrainerCallback],
) -> Trained[PreTrainedModel | PeftModel]:
    method = run.method
    modules = method.trained_modules(run.settings, loaded.model) if method.trained_modules else None
    return train(
        loaded,
        data,
        objective,
        run.training,
        tuning=recipe.acquire.tuning,
        adapter=adapter_settings(recipe.acquire, modules),
        trained_modules=modules,
        folder=folder,
        prompt_format=recipe.model.prompt_format,
        callbacks=callbacks,
        hazardous=method.hazardous,
    )


def subtracted_by(
    method: AnyMethod, trained: PreTrainedModel | PeftModel | TaskVector, base: PreTrainedModel | None = None
) -> TaskVector:
    """What a method subtracts from the original weights at strength 1.

    Args:
        method: What was run.
        trained: What training left; of fully trained twins their difference.
        base: The original model, for full fine-tuning.

    Returns:
        ``-delta`` of ``theta_u = theta_o + strength * delta``, float32: the task vector itself where it is negated.

    Raises:
        TaskVectorError: Training changed nothing, or the two models don't fit.
    """
    if isinstance(trained, TaskVector):
        vector = trained
    elif isinstance(trained, PeftModel):
        vector = TaskVector.from_adapter(trained)
    else:
        assert base is not None
        vector = TaskVector.between(base, trained)
    return vector if method.negates else -vector


def operator_context(
    recipe: Recipe, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: ForgetRetainData, **options: Any
) -> OperatorContext:
    """What a recipe's operators may look at: ``context_of`` with its settings.

    Raises:
        DataError: As ``context_of``.
        ModelError: As ``context_of``.
    """
    cache = recipe.negate.operator_cache
    return context_of(
        base,
        tokenizer,
        data,
        recipe.data,
        prompt_format=recipe.model.prompt_format,
        seed=recipe.seed,
        cache=None if cache is None else Path(cache),
        **options,
    )


def with_safe_dtype(recipe: Recipe) -> ModelConfig:
    """The model's settings; full fine-tuning keeps float32 weights unless told otherwise.

    In bfloat16 a step of usual size rounds away on most weights.
    """
    if recipe.acquire.tuning == "full" and recipe.model.dtype == "auto":
        return dataclasses.replace(recipe.model, dtype="float32")
    return recipe.model
