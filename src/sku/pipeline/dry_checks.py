"""What a dry run looks at: model, data, training and evaluation of a recipe, with every check but those of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sku.attacks.run import check_attacks
from sku.config import ModelConfig, Recipe
from sku.data.examples import ForgetRetainData
from sku.data.joint import JointDataset
from sku.data.prompts import resolve_prompt_format
from sku.errors import RecipeError, one_line
from sku.evaluate import asking
from sku.evaluate.backends import check_source
from sku.evaluate.judges import choose_judge
from sku.evaluate.utility import check_questions
from sku.methods.run import MethodRun, check_rows, has_twins, prepare
from sku.model_files import locate_model
from sku.models import (
    check_four_bit,
    check_not_quantized,
    ensure_pad_token,
    load_config,
    load_tokenizer,
    pick_device,
    pick_dtype,
)
from sku.negate.files import read_folder
from sku.pipeline.recipe_data import load_recipe_data
from sku.plan.estimate import disk_bytes
from sku.plan.job import STATE_BYTES, checkpoints_at_once
from sku.plan.skeleton import without_weights
from sku.processes import current_processes
from sku.training.run import adapter_settings

HUB_WEIGHTS = "the weights of {name} are not in a folder here: they are read from the hub or its cache, and unchecked"
_FULL_STATE = 8.0
"""Bytes of optimizer state for each weight where an optimizer is not known here: that of AdamW, the most there is."""


@dataclass(frozen=True, kw_only=True)
class CheckedModel:
    """A model whose files fit together, without its weights."""

    name: str
    skeleton: PreTrainedModel
    """On the ``meta`` device."""
    parameters: int
    """Of the model itself, tied ones once; the skeleton may get an adapter."""
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    device: torch.device
    notes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Of its weights in memory."""
        return self.parameters * self.dtype.itemsize

    def describe(self) -> str:
        """In one line."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}, {self.parameters:,} parameters, {dtype} on {self.device}"

    def writer(self, recipe: Recipe) -> asking.Writer:
        """What turns prompts into token ids."""
        return asking.Writer.of(self.skeleton, self.tokenizer, recipe.model.prompt_format)


@dataclass(frozen=True, kw_only=True)
class CheckedTraining:
    """What training would be, and what it would leave on the disk."""

    run: MethodRun
    examples: Mapping[str, int]
    """Split -> examples that are trained on."""
    left_out: Mapping[str, int]
    steps: int
    trained_bytes: int
    peak_bytes: int
    """Of checkpoints and trained weights; the unlearned model is not counted."""


def check_model(config: ModelConfig, *, four_bit: bool = False) -> CheckedModel:
    """All of ``load_model`` but the weights' content: of a local folder their headers are read.

    Args:
        config: Of the model.
        four_bit: It is to be quantized while it is loaded.

    Returns:
        The model on the ``meta`` device, its tokenizer, and what could not be checked.

    Raises:
        ModelError: As ``load_model``, and for weight files that are missing, cut off or damaged.
    """
    name, _ = locate_model(config)
    device = pick_device(config.device)
    if four_bit:
        check_four_bit()
    tokenizer = load_tokenizer(config)
    found = load_config(config)
    if config.gguf_file is None:
        check_not_quantized(found, name)
    folder = Path(name)
    if folder.is_dir() and config.gguf_file is None:
        read_folder(folder)
    skeleton = without_weights(found, _dtype(config, found, device), config.path)
    ensure_pad_token(tokenizer, skeleton)
    return CheckedModel(
        name=config.path,
        skeleton=skeleton,
        parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
        tokenizer=tokenizer,
        dtype=skeleton.dtype,
        device=device,
        notes=() if folder.is_dir() else (HUB_WEIGHTS.format(name=config.path),),
    )


def check_data(recipe: Recipe) -> ForgetRetainData:
    """The data of a recipe, read and split as a run does it.

    Raises:
        DataError: It can't be read or split.
        EvaluationError: An attack of the recipe has nothing to ask.
    """
    data = load_recipe_data(recipe)
    check_attacks(recipe, data)
    return data


def check_training(recipe: Recipe, model: CheckedModel, data: ForgetRetainData, folder: Path) -> CheckedTraining:
    """Settings, examples and adapter of a recipe's method.

    Args:
        recipe: Its method is what is trained.
        model: Of ``check_model``. An adapter is added to its skeleton.
        data: The splits, tokenized here.
        folder: Where checkpoints would lie.

    Returns:
        What would be trained.

    Raises:
        DataError: A split keeps no example, or lacks what the method needs.
        RecipeError: A setting is unknown or impossible, or the adapter doesn't fit the model.
    """
    run = prepare(recipe, folder, device=model.device.type)
    check_rows(recipe, data)
    method, settings = run.method, run.training
    objective = method.objective(run.settings, model.skeleton)
    joint = JointDataset(
        data,
        model.tokenizer,
        resolve_prompt_format(recipe.model.prompt_format, model.tokenizer),
        rows=objective.rows,
        max_length=settings.max_length,
        max_answer_tokens=settings.max_answer_tokens,
        seed=settings.seed,
    )
    batch = settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size
    if settings.max_steps > 0:
        steps = settings.max_steps
    else:
        steps = math.ceil(math.ceil(len(joint) / batch) * settings.num_train_epochs)
    trained = _trained_bytes(recipe, run, model)
    optimizer = str(getattr(settings.optim, "value", settings.optim))
    return CheckedTraining(
        run=run,
        examples={name: report.kept for name, report in joint.reports.items()},
        left_out={name: sum(report.left_out.values()) for name, report in joint.reports.items() if report.left_out},
        steps=steps,
        trained_bytes=trained,
        peak_bytes=disk_bytes(
            trained=trained,
            state_bytes=STATE_BYTES.get(optimizer, _FULL_STATE),
            checkpoints=checkpoints_at_once(settings),
            adapter=recipe.acquire.tuning != "full",
            model=0,
        )
        # Checkpoints and weights of both, and their difference, twice: as it is made and as it is kept.
        * (2 if has_twins(recipe) else 1)
        + (4 * trained if has_twins(recipe) else 0),
    )


def check_evaluation(
    recipe: Recipe, model: CheckedModel, data: ForgetRetainData, sources: Mapping[str, str | Path | None]
) -> dict[str, int]:
    """Judge, files and prompts of a recipe's evaluation.

    Args:
        recipe: ``evaluate`` is used.
        model: Of ``check_model``.
        data: The splits.
        sources: What is measured -> where another engine would read it.

    Returns:
        Kind of request -> number of prompts that a model would be asked.

    Raises:
        DataError: The XSTest file can't be read.
        EvaluationError: A judge or task that there isn't, or nothing to ask.
        ModelError: A judge's model, or one that measures similarity, can't be found.
        RecipeError: A wrong setting of a judge.
    """
    config = recipe.evaluate
    choose_judge(config, data)
    check_questions(config)
    if config.embedding_model is not None:
        locate_model(ModelConfig(path=config.embedding_model))
    for source in sources.values():
        check_source(config, source, current_processes().count)
    drawn, writer = asking.draw(data, config, recipe.seed), model.writer(recipe)
    asked, _ = asking.requests(drawn, writer, config)
    # The run's starts are the base model's own replies, which nobody knows yet.
    forced, _ = asking.prefills(drawn.harmful(), config.prefill_tokens, {}, writer, config.max_new_tokens)
    kinds = [str(request.kind) for request in (*asked, *forced)]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def recipe_settings(recipe: Recipe, model: CheckedModel) -> dict[str, Any]:
    """The first lines of a recipe's dry run."""
    return {"recipe": recipe.name, "method": recipe.method, "seed": recipe.seed, "model": model.describe()}


def result_bytes(recipe: Recipe, model: CheckedModel) -> int:
    """Of the unlearned model in its type."""
    dtype = recipe.negate.output_dtype
    return model.bytes if dtype == "same" else model.parameters * getattr(torch, dtype).itemsize


def data_notes(data: ForgetRetainData, model: CheckedModel, training: CheckedTraining | None) -> tuple[str, ...]:
    """What is left out of the data, and what was not checked."""
    left = {} if training is None else training.left_out
    dropped = [f"{count} examples of {name} are left out: no token of their answer is left" for name, count in
               left.items()]  # fmt: skip
    return (*data.notes(), *dropped, *model.notes)


def _dtype(config: ModelConfig, found: PreTrainedConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "stored":
        stored = getattr(found, "dtype", None)
        return stored if isinstance(stored, torch.dtype) else torch.float32
    return pick_dtype(config.dtype, device)


def _trained_bytes(recipe: Recipe, run: MethodRun, model: CheckedModel) -> int:
    """Of the weights that training changes and a checkpoint holds."""
    skeleton = model.skeleton
    modules = run.method.trained_modules(run.settings, skeleton) if run.method.trained_modules else None
    adapter = adapter_settings(recipe.acquire, modules)
    if adapter is None:
        return model.bytes  # Also where only some modules are trained: checkpoints hold the whole model.
    try:
        adapted = get_peft_model(skeleton, adapter, low_cpu_mem_usage=True)
    except ValueError as error:
        raise RecipeError(f"the adapter can't be added: {one_line(error)}") from error
    # PEFT holds adapters in float32 whatever the model's type.
    return 4 * (sum(parameter.numel() for parameter in adapted.parameters()) - model.parameters)
