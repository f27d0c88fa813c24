"""An ``OperatorContext`` out of a run's data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.config import DataConfig, PromptFormatName
from sku.data.examples import Example, ForgetRetainData, RetainExample
from sku.data.prompts import resolve_prompt_format
from sku.data.tokens import tokenize_examples
from sku.negate.operators import PreparedOperator
from sku.negate.operators.base import Need, OperatorContext, missing_examples


def context_of(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: ForgetRetainData,
    lengths: DataConfig | None = None,
    *,
    prompt_format: PromptFormatName = "auto",
    seed: int = 0,
    cache: Path | None = None,
    memory: dict[str, Any] | None = None,
) -> OperatorContext:
    """Tokenizes what operators may look at, as stage 1 reads it.

    Args:
        base: The original model.
        tokenizer: Of the model.
        data: Its splits; ``unseen``, ``retain_test`` and the sets that are reported stay unread.
        lengths: For the longest sequence and answer; the defaults of ``DataConfig`` if None.
        prompt_format: How prompts and answers are written.
        seed: Decides what operators draw.
        cache: Private folder, or None.
        memory: Shared with other contexts of the same model and data.

    Returns:
        The context. A split without examples is empty.

    Raises:
        DataError: No example of a split that has some can be tokenized.
        ModelError: The chat template can't write a prompt.
    """
    style = resolve_prompt_format(prompt_format, tokenizer)
    limits: DataConfig | type[DataConfig] = DataConfig if lengths is None else lengths

    def tokenized(examples: Any, *, train_on_end: bool) -> list[Any]:
        if not examples:
            return []
        return tokenize_examples(
            examples,
            tokenizer,
            style,
            max_length=limits.max_length,
            max_answer_tokens=limits.max_answer_tokens,
            train_on_end=train_on_end,
        )[0]

    return OperatorContext(
        base=base,
        normal=tokenized(data.retain_train, train_on_end=True),
        normal_held_out=tokenized(data.retain_validation, train_on_end=True),
        harmful=tokenized(data.unlearned, train_on_end=False),
        harmful_held_out=tokenized(data.forget_validation, train_on_end=False),
        refusals_held_out=tokenized(_refusals(data), train_on_end=True),
        borderline_held_out=tokenized(_of_other_sources(data), train_on_end=True),
        seed=seed,
        cache=cache,
        memory={} if memory is None else memory,
    )


def check_operators(operators: Sequence[PreparedOperator], base: PreTrainedModel, data: ForgetRetainData) -> None:
    """Refuses operators that couldn't be applied, before anything is trained.

    Args:
        operators: From ``prepare_operators``.
        base: The original model, or its skeleton: names of weights are all that is read.
        data: The splits of the run.

    Raises:
        RecipeError: An operator looks at examples that are not there, or names layers that are not.
    """
    there: dict[Need, Sequence[Example]] = {
        "normal": data.retain_train,
        "normal_held_out": data.retain_validation,
        "harmful": data.unlearned,
        "harmful_held_out": data.forget_validation,
        "refusals_held_out": _refusals(data),
        "borderline_held_out": _of_other_sources(data),
    }
    for chosen in operators:
        for need in chosen.needs:
            if not there[need]:
                raise missing_examples(need, f"the operator {chosen.operator.name}")
        if chosen.operator.check is not None:
            chosen.operator.check(chosen.settings, [name for name, _ in base.named_parameters()])


def _of_other_sources(data: ForgetRetainData) -> list[RetainExample]:
    return [example for examples in data.normal_validation.values() for example in examples]


def _refusals(data: ForgetRetainData) -> list[RetainExample]:
    """The held-out harmful prompts with their safe answers, where they have one."""
    return [
        RetainExample(prompt=example.prompt, answer=example.safe_answer, finished=example.safe_answer_finished)
        for example in data.forget_validation
        if example.safe_answer is not None
    ]
