"""The one interface of all operators: what they are given, and what they give back.

An operator turns a task vector into another before it is subtracted. Most change each row of a weight's difference by
a linear map of the layer's inputs (a factor, a projection); such a map is kept, since a LoRA adapter can follow it:
with ``D = B A`` the map of D is that of A, and the adapter keeps its rank.

Shapes: O = outputs of a layer, I = its inputs, R = rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from sku.config.data import DataConfig, PromptFormatName
from sku.data.examples import Example, ForgetRetainData, RetainExample
from sku.data.tokens import Encoder, TokenizedExample, resolve_prompt_format
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
GroupedBy = Literal["layer", "module", "layer_and_module"]
OTHERS = "others"
"""Group of the weights of no layer."""


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
    """``forget_train``: what stage 1 was trained on."""
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
        _check_there({need: getattr(self, need) for need in needs}, who)


@dataclass(frozen=True, kw_only=True)
class Operated:
    """What an operator makes of a task vector: maps of its rows where that is all, else another vector."""

    record: Mapping[str, Any]
    """For the manifest, plain data."""
    row_maps: Mapping[str, RowMap] | None = None
    """Weight name -> how its rows are changed: an adapter can do the same. Weights without a map stay as they are."""
    vector: TaskVector | None = None
    """None where ``row_maps`` say it."""


@dataclass(frozen=True, kw_only=True)
class Operator(Generic[Settings]):
    """An operator; ``sku.negate.operators.OPERATORS`` lists those that ship with SKU."""

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


@dataclass(frozen=True, kw_only=True)
class PreparedOperator:
    """An operator with its checked settings."""

    operator: AnyOperator
    settings: Any

    @property
    def needs(self) -> tuple[Need, ...]:
        """Data that it looks at with these settings."""
        more = self.operator.more_needs
        return self.operator.needs if more is None else (*self.operator.needs, *more(self.settings))

    @property
    def who(self) -> str:
        """Its name in messages."""
        return f"the operator {self.operator.name}"


def context_of(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: ForgetRetainData,
    lengths: DataConfig | None = None,
    *,
    prompt_format: PromptFormatName = "auto",
    **options: Any,
) -> OperatorContext:
    """Tokenizes what operators may look at, as stage 1 reads it.

    Args:
        base: The original model.
        tokenizer: Of the model.
        data: Its splits; ``forget_test``, ``retain_test`` and the sets that are reported stay unread.
        lengths: For the longest sequence and answer; the defaults of ``DataConfig`` if None.
        prompt_format: How prompts and answers are written.
        options: Of the context: ``seed``, ``cache``, ``memory``.

    Returns:
        The context. A split without examples is empty.

    Raises:
        DataError: No example of a split that has some can be tokenized.
        ModelError: The chat template can't write a prompt.
    """
    limits = () if lengths is None else (lengths.max_length, lengths.max_answer_tokens)
    encoder = Encoder(tokenizer, resolve_prompt_format(prompt_format, tokenizer), *limits)
    tokenized: dict[str, Any] = {
        need: encoder.examples(examples, train_on_end=need not in ("harmful", "harmful_held_out"))[0]
        for need, examples in _splits(data).items()
        if examples
    }
    return OperatorContext(base=base, **tokenized, **options)


def check_operators(operators: Sequence[PreparedOperator], base: PreTrainedModel, data: ForgetRetainData) -> None:
    """Refuses operators that couldn't be applied, before anything is trained.

    Args:
        operators: From ``prepare_operators``.
        base: The original model, or its skeleton: names of weights are all that is read.
        data: The splits of the run.

    Raises:
        RecipeError: An operator looks at examples that are not there, or names layers that are not.
    """
    there = _splits(data)
    for chosen in operators:
        _check_there({need: there[need] for need in chosen.needs}, chosen.who)
        if chosen.operator.check is not None:
            chosen.operator.check(chosen.settings, [name for name, _ in base.named_parameters()])


def _splits(data: ForgetRetainData) -> dict[Need, Sequence[Example]]:
    """What each need is met by."""
    return {
        "normal": data.retain_train,
        "normal_held_out": data.retain_validation,
        "harmful": data.forget_train,
        "harmful_held_out": data.forget_validation,
        "refusals_held_out": [
            RetainExample(prompt=example.prompt, answer=example.safe_answer, finished=example.safe_answer_finished)
            for example in data.forget_validation
            if example.safe_answer is not None
        ],
        "borderline_held_out": [example for examples in data.normal_validation.values() for example in examples],
    }


def _check_there(there: Mapping[Need, Sequence[Any]], who: str) -> None:
    for need, examples in there.items():
        if not examples:
            option = DATA_OPTIONS.get(need)
            what = {
                "refusals_held_out": ", which are safe answers to held-out harmful prompts,",
                "borderline_held_out": ", which are half of each set of data.normal that has answers,",
            }.get(need, "")
            how = f"give {option} FILE to sku negate, or run it from a recipe with sku run"
            raise RecipeError(
                f"{who} looks at {need.replace('_', ' ')} examples{what} and there are none: "
                f"{how if option else 'name them in a recipe'}"
            )


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


def scaling(factor: float) -> RowMap:
    """``factor * row``."""
    return lambda rows_RI: rows_RI * factor


def turned_weights(base: nn.Module) -> set[str]:
    """Names of the weights that are kept as ``[I, O]`` (GPT-2's layers), others are ``[O, I]``."""
    return {f"{name}.weight" for name, module in base.named_modules() if isinstance(module, Conv1D)}


def linear_weights(base: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    """Weight name -> linear layer, for all whose weight serves no embedding as well.

    An output head that is tied to the embedding is not among them: its rows are read by token, too, so that inputs
    alone don't say what a change of it does.
    """
    embedding = base.get_input_embeddings()
    tied = None if embedding is None else embedding.weight
    return {
        f"{name}.weight": module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module.weight is not tied
    }


def group_of(name: str, per: GroupedBy) -> str:
    """The group of a weight.

    Args:
        name: ``model.layers.3.mlp.up_proj.weight``.
        per: What is grouped by.

    Returns:
        ``3``, ``mlp.up_proj`` or ``3.mlp.up_proj``; ``others`` for weights of no layer.
    """
    found = re.search(r"\.(\d+)\.(?!(?:weight|bias)$)(.+?)(?:\.(?:weight|bias))?$", name)
    if found is None:
        return OTHERS
    layer, module = found.groups()
    return {"layer": layer, "module": module, "layer_and_module": f"{layer}.{module}"}[per]
