"""The one interface of all operators: what they are given, and what they give back.

An operator turns a task vector into another before it is subtracted. Most change each row of a weight's difference by
a linear map of the layer's inputs (a factor, a projection); such a map is kept, since a LoRA adapter can follow it:
with ``D = B A`` the map of D is that of A, and the adapter keeps its rank.

Shapes: O = outputs of a layer, I = its inputs, R = rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sku.data.tokens import TokenizedExample
from sku.errors import RecipeError
from sku.negate.task_vector import TaskVector

Settings = TypeVar("Settings")
Need = Literal["normal", "normal_held_out", "harmful", "harmful_held_out", "refusals_held_out", "borderline_held_out"]
DATA_OPTIONS: Mapping[Need, str] = {
    "normal": "--normal", "normal_held_out": "--normal", "harmful": "--forget", "harmful_held_out": "--forget",
    "refusals_held_out": "--forget",
}  # fmt: skip
"""Which option of ``sku negate`` brings the examples that an operator looks at; no option brings borderline ones."""
RowMap = Callable[[Tensor], Tensor]
"""``[R, I]`` float32 to the same shape, each row by itself and linearly."""


@dataclass(frozen=True, kw_only=True)
class OperatorContext:
    """What operators may look at. Prompts held out for evaluation are not in it."""

    base: PreTrainedModel
    """The original model. Operators don't change it."""
    normal: Sequence[TokenizedExample] = ()
    """``retain_train``, prompt and answer."""
    normal_held_out: Sequence[TokenizedExample] = ()
    """``retain_validation``: stage 1 has not trained on it."""
    harmful: Sequence[TokenizedExample] = ()
    """``unlearned``: what stage 1 was trained on."""
    harmful_held_out: Sequence[TokenizedExample] = ()
    """``forget_validation``, prompt and harmful answer: stage 1 has not trained on it."""
    refusals_held_out: Sequence[TokenizedExample] = ()
    """The same prompts with their safe answers, where they have one."""
    borderline_held_out: Sequence[TokenizedExample] = ()
    """Of each ``normal_validation:NAME``: pairs of other sources, such as prompts that only sound harmful."""
    seed: int = 0
    """Decides which examples are drawn, and their order."""
    batch_size: int = 8
    """Examples at once."""
    cache: Path | None = None
    """Private folder for what is expensive and depends on the original model and the data alone; None for none."""
    memory: dict[str, Any] = field(default_factory=dict, repr=False)
    """The same within one process: operators and diagnostics share what they measured."""

    def check(self, needs: Sequence[Need], who: str) -> None:
        """Refuses to work without the data that an operator looks at.

        Raises:
            RecipeError: With the first kind that is missing.
        """
        for need in needs:
            if not getattr(self, need):
                raise missing_examples(need, who)


@dataclass(frozen=True, kw_only=True)
class Operated:
    """What an operator made of a task vector."""

    vector: TaskVector
    row_maps: Mapping[str, RowMap] | None
    """Weight name -> how its rows were changed, where that is all the operator did: an adapter can do the same."""
    record: Mapping[str, Any]
    """For the manifest, plain data."""


@dataclass(frozen=True, kw_only=True)
class Operator(Generic[Settings]):
    """An operator. One file defines one, and ``sku.negate.operators.OPERATORS`` lists them."""

    name: str
    """As in a recipe's ``negate.operators``."""
    title: str
    """As in tables."""
    paper_url: str
    settings: type[Settings]
    """Frozen dataclass of the operator's own settings."""
    apply: Callable[[Settings, TaskVector, OperatorContext], Operated]
    """``TaskVectorError`` where the vector doesn't fit."""
    needs: tuple[Need, ...] = ()
    """Data that it looks at, if any."""
    more_needs: Callable[[Settings], tuple[Need, ...]] | None = None
    """Data that it looks at with some settings only."""
    check: Callable[[Settings, Sequence[str]], None] | None = None
    """Refuses settings that don't fit the names of a model's weights (``RecipeError``), before anything is trained."""
    only_setting: str | None = None
    """The one setting that it has, where a recipe gives its keys and values without naming it."""


AnyOperator = Operator[Any]


def missing_examples(need: Need, who: str) -> RecipeError:
    """The refusal to work without examples.

    Args:
        need: The kind that is missing.
        who: What looks at them.

    Returns:
        The error, with what to do.
    """
    option = DATA_OPTIONS.get(need)
    what = {
        "refusals_held_out": ", which are safe answers to held-out harmful prompts,",
        "borderline_held_out": ", which are half of each set of data.normal that has answers,",
    }.get(need, "")
    how = (
        f"give {option} FILE to sku negate, or run it from a recipe with sku run"
        if option
        else "name them in a recipe"
    )
    return RecipeError(f"{who} looks at {need.replace('_', ' ')} examples{what} and there are none: {how}")


def map_rows(vector: TaskVector, row_maps: Mapping[str, RowMap], base: nn.Module) -> TaskVector:
    """Applies row maps to the differences of a vector; differences without a map stay as they are.

    Args:
        vector: The task vector.
        row_maps: Weight name -> map.
        base: The original model, which says which layers keep their weight as ``[I, O]``.

    Returns:
        A new vector.
    """
    turned = turned_weights(base)
    deltas = dict(vector.deltas)
    for name, row_map in row_maps.items():
        delta = deltas[name]
        deltas[name] = row_map(delta.T).T if name in turned else row_map(delta)
    return TaskVector(deltas, vector.tied)


def norms(before: TaskVector, after: TaskVector) -> dict[str, float]:
    """Both norms, for the manifest."""
    return {"norm_before": before.norm(), "norm_after": after.norm()}


def scaling(factor: float) -> RowMap:
    """``factor * row``."""

    def scaled(rows_RI: Tensor) -> Tensor:
        return rows_RI * factor

    return scaled


def turned_weights(base: nn.Module) -> set[str]:
    """Names of the weights that are kept as ``[I, O]`` (GPT-2's layers), others are ``[O, I]``."""
    return {f"{name}.weight" for name, module in base.named_modules() if isinstance(module, Conv1D)}


def linear_weights(base: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    """Weight name -> linear layer, for all whose weight serves no embedding as well.

    Args:
        base: The original model.

    Returns:
        In the model's order. An output head that is tied to the embedding is not among them: its rows are read by
        token, too, so that inputs alone don't say what a change of it does.
    """
    embedding = base.get_input_embeddings()
    tied = None if embedding is None else embedding.weight
    return {
        f"{name}.weight": module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module.weight is not tied
    }
