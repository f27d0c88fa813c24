"""Task vectors, the difference of two models, and stage 2 in memory, for sweeps and in Python.

``tau = theta_bad - theta_o``, one float32 tensor per weight, tied weights once; ``theta_u = theta_o - alpha * tau``.
``negate.transform`` names a user's own file, whose function ``transform(vector: TaskVector, context:
TransformContext) -> TaskVector`` changes the vector before: ``random_direction`` is one.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FunctionType

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.config.check import check_alpha
from sku.config.data import ModelConfig
from sku.config.recipe import Recipe
from sku.data.examples import ForgetRetainData
from sku.data.tokens import Encoder, TokenizedExample, resolve_prompt_format
from sku.errors import RecipeError, TaskVectorError
from sku.from_file import names_in_file
from sku.models import LoadedModel, check_plain_weights, load_model
from sku.negate.adapters import AdapterVector, load_adapter
from sku.negate.arithmetic import (
    Sums,
    dot_float64,
    overflows,
    subtract_tensors,
    unusable_difference,
    unusable_result,
)
from sku.negate.matching import (
    EQUAL_MODELS,
    VECTOR_FILE,
    VECTOR_FORMAT,
    ModelSource,
    bad_form,
    match_changes,
    match_models,
    read_ties,
    unique_weights,
)
from sku.storage import check_space, mark_hazardous, new_folder


class TaskVector:
    """A set of named float32 differences that can be scaled, measured and saved."""

    def __init__(self, deltas: Mapping[str, Tensor], tied: Mapping[str, str] | None = None) -> None:
        """Wraps differences.

        Raises:
            TaskVectorError: A difference is no floating-point tensor or is not finite.
        """
        self.deltas = {name: delta.detach().to("cpu", torch.float32) for name, delta in deltas.items()}
        self.tied = dict(tied or {})
        for name, delta in deltas.items():
            if not delta.is_floating_point():
                raise TaskVectorError(f"the difference of {name} is {delta.dtype}; it must be floating point")
            # No float32 squared is too large for float64, and ``isfinite`` takes temporary tensors of the whole size.
            if not math.isfinite(dot_float64(self.deltas[name], self.deltas[name])):
                raise unusable_difference(name)

    @classmethod
    def between(cls, base: nn.Module, bad: nn.Module) -> TaskVector:
        """``bad - base``, computed in float32.

        Raises:
            TaskVectorError: Names, shapes, ties or integer buffers differ, a weight is quantized or not finite, or
                nothing differs.
        """
        original = ModelSource(base)
        theirs = match_models(original, ModelSource(bad)).changes
        deltas = {
            name: theirs[name].detach().cpu().float() - weight.detach().cpu().float()
            for name, weight in original.weights.items()
        }
        vector = cls(deltas, original.ties)
        if vector.norm() == 0:
            raise TaskVectorError(EQUAL_MODELS)
        return vector

    @classmethod
    def from_factors(cls, vector: AdapterVector) -> TaskVector:
        """The difference that an adapter makes: ``scaling * B A`` per adapted weight, computed in float32."""
        return cls({name: change.delta() for name, change in vector.factors.items()})

    def __mul__(self, factor: float) -> TaskVector:
        return TaskVector({name: delta * factor for name, delta in self.deltas.items()}, self.tied)

    __rmul__ = __mul__

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def norms(self) -> dict[str, float]:
        """Euclidean norm of each difference."""
        return {name: math.sqrt(dot_float64(delta, delta)) for name, delta in self.deltas.items()}

    def norm(self) -> float:
        """Euclidean norm of the whole vector."""
        return math.sqrt(sum(norm**2 for norm in self.norms().values()))

    def save(self, folder: Path | str) -> None:
        """Writes the vector as safetensors into a new private folder: it is as hazardous as the bad model.

        Raises:
            OutputError: The folder exists or can't be written.
        """
        tensors = {name: delta.contiguous() for name, delta in self.deltas.items()}
        with new_folder(Path(folder), private=True) as temporary:
            mark_hazardous(temporary)
            save_file(tensors, temporary / VECTOR_FILE, {"format": VECTOR_FORMAT, "tied": json.dumps(self.tied)})

    @classmethod
    def load(cls, folder: Path | str) -> TaskVector:
        """Reads what ``save`` wrote.

        Raises:
            TaskVectorError: There is no task vector, or the file is damaged.
        """
        path = Path(folder) / VECTOR_FILE
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                deltas = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError) as error:
            raise TaskVectorError(f"{path} can't be read: {error}") from error
        return cls(deltas, read_ties(metadata, path))


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
    subtract_into(unlearned, original, change, alpha)
    unlearned.requires_grad_(requires_grad=True)
    unlearned.eval()
    return unlearned


def task_vector_of(base: PreTrainedModel, bad: PreTrainedModel | PeftModel | TaskVector | str | Path) -> TaskVector:
    """The task vector of a bad model in any of its forms, for some or all weights of the base.

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
        form = bad_form(folder)
        if form == "vector":
            return TaskVector.load(folder)
        if form == "adapter":
            return TaskVector.from_factors(AdapterVector.of(load_adapter(copy.deepcopy(base), folder)))
        return _as_stored(folder)
    return TaskVector.from_factors(AdapterVector.of(bad)) if isinstance(bad, PeftModel) else bad


def _as_stored(path: str | Path) -> PreTrainedModel:
    """A model in the type of its files: rounding it to another while loading would round the difference too."""
    return load_model(ModelConfig(path=str(path), dtype="stored")).model


def save_unlearned(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves a model with its tokenizer, whole or not at all.

    Raises:
        OutputError: The folder exists, can't be written, or the disk is too small.
    """
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    check_space(folder, int(size * 1.05), f"the unlearned model in {folder}")
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


@contextmanager
def base_as_files(loaded: LoadedModel, beside: Path) -> Iterator[Path]:
    """The model as transformers saves it, in a folder beside one for a while: for GGUF, and names that it changes.

    Raises:
        OutputError: The disk is too small.
    """
    beside.parent.mkdir(parents=True, exist_ok=True)
    # Another name than that of a folder that becomes `beside`: making one removes what was left of it.
    with TemporaryDirectory(prefix=f".{beside.name}-base.", suffix=".unfinished", dir=beside.parent) as place:
        save_unlearned(loaded.model, loaded.tokenizer, Path(place) / "base")
        yield Path(place) / "base"


def round_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Changes the type of what is saved, in place. ``model.to(dtype)`` would round the rotary frequencies as well.

    What the type can't hold becomes infinite; ``subtract_into`` refuses that.
    """
    saved = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) in saved and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def subtract_into(
    unlearned: PreTrainedModel, original: PreTrainedModel, bad: TaskVector | PreTrainedModel, alpha: float
) -> Sums:
    """Writes ``original - alpha * vector`` into a copy of the original, tensor by tensor.

    Args:
        unlearned: Gets the result, in its own type. Weights that the vector doesn't change stay as they are.
        original: The original model. It is not changed.
        bad: The task vector, or a whole bad model, whose vector is then never in memory.
        alpha: Finite. 0 gives the original weights bit for bit.

    Returns:
        Sums over all changed weights: what was wanted, and what rounding kept of it.

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
    return sums


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
        RecipeError: The file can't be used, or defines none.
    """
    names = names_in_file(path, "transform")
    found = names.get("transform")
    if not isinstance(found, FunctionType) or found.__module__ != names["__name__"]:
        raise RecipeError(f"the transform file {path} defines no function transform of its own")
    return found


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
