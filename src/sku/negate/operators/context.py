"""An ``OperatorContext`` out of a run's data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.config import DataConfig, PromptFormatName
from sku.data.examples import ForgetRetainData
from sku.data.prompts import resolve_prompt_format
from sku.data.tokenization import tokenize_examples
from sku.negate.operators.base import OperatorContext


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
        data: Its splits; ``unseen`` and ``retain_test`` stay unread.
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
        seed=seed,
        cache=cache,
        memory={} if memory is None else memory,
    )
