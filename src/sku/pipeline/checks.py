"""What is checked before a command begins: model, data, training and evaluation of a recipe, all but weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sku.config import ModelConfig, Recipe
from sku.data.examples import ForgetRetainData
from sku.data.read import is_embedded
from sku.evaluate.generation import prompts
from sku.evaluate.generation.prompts import keys_of, prefills, with_answers
from sku.evaluate.judges.choose import choose_judge
from sku.evaluate.utility import task_manager
from sku.methods.run import MethodRun, check_rows, has_twins, with_safe_dtype
from sku.model_files import check_not_quantized, locate_model, with_gguf_file
from sku.models import (
    check_four_bit,
    ensure_pad_token,
    load_config,
    load_tokenizer,
    pick_device,
    pick_dtype,
    with_adapter,
    without_weights,
)
from sku.negate.files import read_folder
from sku.training.config import state_bytes
from sku.training.run import adapter_settings


@dataclass(frozen=True, kw_only=True)
class CheckedModel:
    """A model whose files fit together, without its weights."""

    name: str
    skeleton: PreTrainedModel
    """On the ``meta`` device."""
    parameters: int
    """Of the model itself, tied ones once; the skeleton may get an adapter."""
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    notes: tuple[str, ...]

    def bytes(self, dtype: torch.dtype | None = None) -> int:
        """Of its weights, in their type or another."""
        return self.parameters * (dtype or self.skeleton.dtype).itemsize

    def describe(self) -> str:
        """In one line."""
        dtype = str(self.skeleton.dtype).removeprefix("torch.")
        return f"{self.name}, {self.parameters:,} parameters, {dtype} on {self.device}"

    def encoder(self, recipe: Recipe) -> prompts.PromptEncoder:
        """What turns prompts into token ids."""
        return prompts.PromptEncoder.of(self.skeleton, self.tokenizer, recipe.model.prompt_format)


@dataclass(frozen=True, kw_only=True)
class CheckedTraining:
    """What training is, and what it leaves on the disk."""

    batch: int
    """Examples of one optimizer step, of all processes together."""
    run: MethodRun
    """With its joint examples."""
    examples: Mapping[str, int]
    """Split -> examples; of those that are trained on, those that survive tokenization."""
    notes: tuple[str, ...]
    """What of the examples is left out."""
    steps: int
    peak_bytes: int
    """Of checkpoints and trained weights; the unlearned model is not counted."""


def check_model(config: ModelConfig, *, four_bit: bool = False) -> CheckedModel:
    """All of ``load_model`` but the weights' content: of a local folder their headers are read.

    Raises:
        ModelError: As ``load_model``, and for weight files that are missing, cut off or damaged.
    """
    config = with_gguf_file(config)
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
    on_hub = f"the weights of {config.path} are not in a folder here: they are read from the hub, and unchecked"
    return CheckedModel(
        name=config.path,
        skeleton=skeleton,
        parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
        tokenizer=tokenizer,
        device=device,
        notes=() if folder.is_dir() else (on_hub,),
    )


def check_trained_model(recipe: Recipe) -> CheckedModel:
    """``check_model`` for the model that a recipe trains."""
    return check_model(with_safe_dtype(recipe), four_bit=recipe.acquire.tuning == "qlora")


def check_training(recipe: Recipe, model: CheckedModel, data: ForgetRetainData, run: MethodRun) -> CheckedTraining:
    """Settings, examples and adapter of a recipe's method.

    Args:
        recipe: Its method is what is trained.
        model: Of ``check_model``. An adapter is added to its skeleton.
        data: The splits, tokenized here.
        run: The method, as it is resolved.

    Raises:
        DataError: A split keeps no example, or lacks what the method needs.
        RecipeError: A setting is unknown or impossible, or the adapter doesn't fit the model.
    """
    check_rows(recipe, data)
    run, settings = run.tokenized(recipe, data, model.tokenizer, model.skeleton), run.training
    joint = run.joint
    assert joint is not None
    batch = int(settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size)
    steps = settings.max_steps
    if steps <= 0:
        steps = math.ceil(math.ceil(len(joint) / batch) * settings.num_train_epochs)
    counts = data.counts()
    return CheckedTraining(
        batch=batch,
        run=run,
        examples=counts | {name: report.kept for name, report in joint.reports.items() if name in counts},
        notes=tuple(
            f"{sum(report.left_out.values())} examples of {name} are left out: no token of their answer is left"
            for name, report in joint.reports.items()
            if report.left_out
        ),
        steps=steps,
        peak_bytes=_peak_bytes(recipe, run, model),
    )


def check_evaluation(recipe: Recipe, model: CheckedModel, data: ForgetRetainData) -> dict[str, int]:
    """Judge, files and prompts of a recipe's evaluation.

    Args:
        recipe: ``evaluate`` is used.
        model: Of ``check_model``.
        data: The splits.

    Returns:
        Kind of request -> number of prompts that a model is asked.

    Raises:
        DataError: The XSTest file can't be read.
        EvaluationError: A judge or task that there isn't, or nothing to ask.
        ModelError: A judge's model, or one that measures similarity, can't be found.
        RecipeError: A wrong setting of a judge.
    """
    config = recipe.evaluate
    choose_judge(config, data)
    if config.lm_eval:
        task_manager(config.lm_eval)
    if config.similarity_model is not None:
        locate_model(ModelConfig(path=config.similarity_model))
    drawn, encoder = prompts.draw(data, config, recipe.seed), model.encoder(recipe)
    asked, _ = prompts.requests(drawn, encoder, config)
    # The run's starts are the base model's own replies, which nobody knows yet.
    starts, keys = with_answers(drawn.harmful(), {}), keys_of(config, english=not is_embedded(data))
    prefilled, _ = prefills(drawn.harmful(), keys, starts, encoder, config.max_new_tokens)
    kinds = [str(request.kind) for request in (*asked, *prefilled)]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def _dtype(config: ModelConfig, found: PreTrainedConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "stored":
        stored = getattr(found, "dtype", None)
        return stored if isinstance(stored, torch.dtype) else torch.float32
    return pick_dtype(config.dtype, device)


def _peak_bytes(recipe: Recipe, run: MethodRun, model: CheckedModel) -> int:
    modules = run.method.trained_modules(run.settings, model.skeleton) if run.method.trained_modules else None
    adapter = adapter_settings(recipe.acquire, modules)
    if adapter is None:
        trained = model.bytes()  # Also where only some modules are trained: checkpoints hold the whole model.
    else:
        adapted = with_adapter(model.skeleton, adapter)
        trained = sum(parameter.nbytes for parameter in adapted.parameters() if parameter.requires_grad)
    training = run.training
    # The next checkpoint is written before the oldest is deleted.
    checkpoints = 0 if training.save_strategy == "no" else (training.save_total_limit or 0) + 1
    peak = checkpoints * (trained + state_bytes(training.optim, trained)) + trained
    peak += trained if adapter is not None else 0  # An adapter is saved negated, too.
    # Of twins checkpoints and weights of both, and their difference, twice: as it is made and as it is kept.
    return 2 * peak + 4 * trained if has_twins(recipe) else peak
