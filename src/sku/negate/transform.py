"""``negate.transform``: a function of a user's own file that changes the task vector before it is subtracted.

The file defines ``transform(vector: TaskVector, context: TransformContext) -> TaskVector``; ``docs/examples`` has two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.config.recipe import Recipe
from sku.data.examples import ForgetRetainData
from sku.data.tokens import Encoder, TokenizedExample, resolve_prompt_format
from sku.errors import RecipeError, TaskVectorError
from sku.from_file import function_in_file
from sku.negate.task_vector import TaskVector


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
