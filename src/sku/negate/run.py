"""Stage 2 in memory, for sweeps and in Python: ``theta_u = theta_o - alpha * (theta_bad - theta_o)``.

``negate.transform`` names a user's own file, whose function ``transform(vector: TaskVector, context:
TransformContext) -> TaskVector`` changes the vector before; ``docs/examples`` has two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.config.check import check_alpha
from sku.config.data import ModelConfig
from sku.config.recipe import Recipe
from sku.data.examples import ForgetRetainData
from sku.data.tokens import Encoder, TokenizedExample, resolve_prompt_format
from sku.errors import RecipeError, TaskVectorError
from sku.from_file import function_in_file
from sku.models import LoadedModel, check_plain_weights, load_model
from sku.negate.adapters import load_adapter
from sku.negate.arithmetic import Negation, overflows, subtract_tensors, unusable_result
from sku.negate.files import ADAPTER_CONFIG
from sku.negate.task_vector import (
    EQUAL_MODELS,
    ModelSource,
    TaskVector,
    match_changes,
    match_models,
    unique_weights,
)
from sku.storage import check_space, new_folder


def negate(
    base: PreTrainedModel | str | Path,
    bad: PreTrainedModel | PeftModel | TaskVector | str | Path,
    alpha: float = 1.0,
    *,
    output_dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Subtracts what stage 1 learned from the original weights.

    Args:
        base: The original model, or where to load it from. It is not changed. A model that carries an adapter in
            training is not original: give its name, or ``bad`` alone decides the weights.
        bad: The model of stage 1: with its adapter, or fully trained, or a task vector, or a folder of one of these.
        alpha: How much to subtract, 0 or more; the paper uses 1. 0 gives the original weights bit for bit.
            ``choose_alpha`` finds one on held-out data.
        output_dtype: Type of the result; that of the base if None. The arithmetic is float32.

    Returns:
        A new model in evaluation mode.

    Raises:
        RecipeError: ``alpha`` is no finite number, or below 0.
        TaskVectorError: Names, shapes or ties don't fit, or weights are quantized or not finite.
        ModelError: A model can't be loaded.
    """
    return negate_with_record(base, bad, alpha, output_dtype=output_dtype)[0]


def negate_with_record(
    base: PreTrainedModel | str | Path,
    bad: PreTrainedModel | PeftModel | TaskVector | str | Path,
    alpha: float = 1.0,
    *,
    output_dtype: torch.dtype | None = None,
) -> tuple[PreTrainedModel, Negation]:
    """``negate``, with an account of what was changed and what rounding kept of it."""
    if isinstance(alpha, str):
        raise RecipeError(f"alpha is {alpha!r}; it must be a number, such as that of choose_alpha(...).alpha()")
    check_alpha(alpha)
    original = _as_stored(base) if isinstance(base, str | Path) else base
    check_plain_weights(original, "base")
    if any("lora_" in name for name, _ in original.named_parameters()):
        raise TaskVectorError("the base model carries an adapter; give the original model or its name")
    change = _vector_or_model(original, bad)
    unlearned = copy.deepcopy(original)
    if output_dtype is not None:
        round_weights(unlearned, output_dtype)
    record = subtract_into(unlearned, original, change, alpha)
    unlearned.requires_grad_(requires_grad=True)
    unlearned.eval()
    return unlearned, record


def task_vector_of(base: PreTrainedModel, bad: PreTrainedModel | PeftModel | TaskVector | str | Path) -> TaskVector:
    """The task vector of a bad model in any of its forms.

    Args:
        base: The original model.
        bad: As in ``negate``.

    Returns:
        Differences for some or all weights of the base.

    Raises:
        TaskVectorError: The two don't fit.
        ModelError: A folder can't be loaded.
    """
    change = _vector_or_model(base, bad)
    return change if isinstance(change, TaskVector) else TaskVector.between(base, change)


def _vector_or_model(
    base: PreTrainedModel, bad: PreTrainedModel | PeftModel | TaskVector | str | Path
) -> TaskVector | PreTrainedModel:
    """A vector where the bad model is one or is an adapter; a whole model stays one, its vector would be as large."""
    if isinstance(bad, str | Path):
        folder = Path(bad)
        if TaskVector.is_saved_in(folder):
            return TaskVector.load(folder)
        if (folder / ADAPTER_CONFIG).is_file():
            return TaskVector.from_adapter(load_adapter(copy.deepcopy(base), folder))
        return _as_stored(folder)
    return TaskVector.from_adapter(bad) if isinstance(bad, PeftModel) else bad


def _as_stored(path: str | Path) -> PreTrainedModel:
    """A model in the type of its files: rounding it to another while loading would round the difference too."""
    return load_model(ModelConfig(path=str(path), dtype="stored")).model


def save_unlearned(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, overwrite: bool = False
) -> None:
    """Saves a model with its tokenizer, whole or not at all.

    Raises:
        OutputError: The folder exists, can't be written, or the disk is too small.
    """
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    check_space(folder, int(size * 1.05), f"the unlearned model in {folder}")
    with new_folder(folder, overwrite=overwrite) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


@contextmanager
def base_as_files(loaded: LoadedModel, beside: Path) -> Iterator[Path]:
    """The model as transformers saves it, in a folder that is gone afterwards: for GGUF, and names that it changes.

    Args:
        loaded: Model and tokenizer.
        beside: The folder lies beside this one.

    Raises:
        OutputError: The disk is too small.
    """
    beside.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{beside.name}.", suffix=".unfinished", dir=beside.parent) as place:
        save_unlearned(loaded.model, loaded.tokenizer, Path(place) / "base")
        yield Path(place) / "base"


def round_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Changes the type of what is saved. ``model.to(dtype)`` would round the rotary frequencies as well.

    Args:
        model: Changed in place.
        dtype: Of the result. What it can't hold becomes infinite; ``subtract_into`` refuses that.
    """
    saved = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) in saved and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def subtract_into(
    unlearned: PreTrainedModel, original: PreTrainedModel, bad: TaskVector | PreTrainedModel, alpha: float
) -> Negation:
    """Writes ``original - alpha * vector`` into a copy of the original, tensor by tensor.

    Args:
        unlearned: Gets the result, in its own type. Weights that the vector doesn't change stay as they are.
        original: The original model. It is not changed.
        bad: The task vector, or a whole bad model, whose vector is then never in memory.
        alpha: Finite. 0 gives the original weights bit for bit.

    Returns:
        What was changed, and what rounding kept of it.

    Raises:
        TaskVectorError: Names, shapes or ties don't fit, or a result is not finite.
    """
    base, targets = ModelSource(original), unique_weights(unlearned)[0]
    if isinstance(bad, TaskVector):
        changes = match_changes(base, bad.deltas, bad.tied).changes
    else:
        changes = match_models(base, ModelSource(bad)).changes
    is_vector = isinstance(bad, TaskVector)
    sums = subtract_tensors(base.weights, changes, targets, alpha, are_differences=is_vector)
    if not is_vector and sums.difference == 0:
        raise TaskVectorError(EQUAL_MODELS)
    for name in base.weights.keys() - changes.keys():
        if overflows(base.weights[name], targets[name]):
            raise unusable_result(name, targets[name].dtype)
    return Negation.of(sums, alpha, len(changes), unlearned.dtype)


@dataclass(frozen=True, kw_only=True)
class TransformContext:
    """What a transform may look at. Prompts held out for evaluation are not in it."""

    base: PreTrainedModel
    """The original model, not to be changed."""
    normal: Sequence[TokenizedExample]
    """``retain_train``, prompt and answer, as stage 1 reads them."""
    seed: int
    """Of the training."""


def transform_in(path: str) -> Callable[[TaskVector, TransformContext], TaskVector]:
    """The function ``transform`` of a file.

    Raises:
        RecipeError: The file can't be used.
    """
    return function_in_file(path, "transform")


def transformed(
    recipe: Recipe,
    vector: TaskVector,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: ForgetRetainData,
) -> TaskVector:
    """What a recipe subtracts: the vector itself without ``negate.transform``.

    Raises:
        RecipeError: The file can't be used, or gives no task vector.
        TaskVectorError: Nothing is left of the vector.
        DataError: No normal example can be tokenized.
    """
    path = recipe.negate.transform
    if path is None or recipe.method != "sku":
        return vector
    written = resolve_prompt_format(recipe.model.prompt_format, tokenizer)
    encoder = Encoder(tokenizer, written, recipe.data.max_length, recipe.data.max_answer_tokens)
    normal, _ = encoder.examples(data.retain_train, train_on_end=True)
    seed = recipe.seed if recipe.acquire.seed is None else recipe.acquire.seed
    changed = transform_in(path)(vector, TransformContext(base=base, normal=normal, seed=seed))
    if not isinstance(changed, TaskVector):
        raise RecipeError(f"{path}: transform gives {type(changed).__name__}; it must give a TaskVector")
    if changed.norm() == 0:
        raise TaskVectorError(f"{path} leaves nothing of the task vector")
    return changed
