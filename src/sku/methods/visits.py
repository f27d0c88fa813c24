"""Which harmful examples training visits, known before it: a pure function of data, seed, steps and batch.

A run takes so many steps and no more, so most prompts of a large forget set are never trained on. What is said of
"trained-on prompts" is asked of those that were.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku.config import Recipe
from sku.data.examples import ForgetRetainData
from sku.data.joint import JointDataset, RowPlan
from sku.data.prompts import resolve_prompt_format
from sku.errors import SkuError
from sku.methods.run import prepare
from sku.training.config import UnlearningConfig


def with_visited(
    recipe: Recipe,
    data: ForgetRetainData,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    *,
    processes: int = 1,
) -> ForgetRetainData:
    """The data, with the harmful examples named that the recipe's training visits.

    Args:
        recipe: Its method, seed and training settings decide.
        data: The splits.
        tokenizer: Of the model.
        model: The original one, asked for its shape alone.
        processes: That train together.

    Returns:
        The splits with ``visited`` set; None there where it can't be told: the recipe can't be trained here (training
        itself says why), or its settings let the trainer choose its batches.
    """
    try:
        run = prepare(recipe, Path("unused"), device="cpu")
        joint = JointDataset(
            data,
            tokenizer,
            resolve_prompt_format(recipe.model.prompt_format, tokenizer),
            # Of all rows those that decide which examples there are.
            rows=RowPlan(safe=run.method.objective(run.settings, model).rows.safe),
            max_length=run.training.max_length,
            max_answer_tokens=run.training.max_answer_tokens,
            seed=run.training.seed,
        )
        visited = visited_examples(joint, run.training, processes=processes)
    except SkuError:
        visited = None
    return dataclasses.replace(data, visited=visited)


def common_visits(
    recipe: Recipe, data: ForgetRetainData, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> ForgetRetainData:
    """As ``with_visited``, of SKU with the recipe's own seed: what the methods of one comparison are all asked.

    Each sees the same joint examples in the same order; another number of steps, another seed, or rows that lack a
    safe answer make it another part of them.

    Args:
        recipe: Of any job of the comparison.
        data: The splits.
        tokenizer: Of the model.
        model: The original one, asked for its shape alone.

    Returns:
        As ``with_visited``.
    """
    plain = dataclasses.replace(
        recipe,
        method="sku",
        acquire=dataclasses.replace(recipe.acquire, seed=None),
        negate=dataclasses.replace(recipe.negate, operators=()),
    )
    return with_visited(plain, data, tokenizer, model)


def visited_examples(joint: JointDataset, training: UnlearningConfig, *, processes: int = 1) -> tuple[int, ...] | None:
    """Places among ``data.forget_train`` that training visits.

    Args:
        joint: What is trained on.
        training: Steps, epochs, batch and accumulation.
        processes: That train together.

    Returns:
        In order; None where the trainer chooses its batches by itself.
    """
    if training.auto_find_batch_size or training.ignore_data_skip:
        return None
    # Of one device: transformers multiplies by the GPUs that it sees, and a process trains on one.
    batch = training.per_device_train_batch_size * processes
    places = visited_places(
        len(joint),
        steps=training.max_steps,
        epochs=training.num_train_epochs,
        batch=batch,
        accumulation=training.gradient_accumulation_steps,
        drop_last=training.dataloader_drop_last and processes == 1,
    )
    return joint.forget_at(place for part in places for place in part)


def visited_places(
    size: int, *, steps: int, epochs: float, batch: int, accumulation: int, drop_last: bool = False
) -> Iterator[range]:
    """Positions, counted over all epochs, that training visits; it ends where nothing new can come.

    An epoch has ``ceil(size / batch)`` batches (``floor`` with ``drop_last``), a step takes ``accumulation`` of them,
    and the last step of an epoch what is left.

    Args:
        size: Examples of an epoch.
        steps: Optimizer steps; below 0 for ``epochs`` in full.
        epochs: Used where ``steps`` is below 0.
        batch: Examples of a batch of all processes together.
        accumulation: Batches of a step.
        drop_last: A batch that is not full is left out.

    Yields:
        One range an epoch.
    """
    used = size // batch * batch if drop_last else size
    in_epoch = max(1, math.ceil(math.ceil(used / batch) / accumulation))
    left = math.ceil(epochs * in_epoch) if steps < 0 else steps
    epoch = 0
    while left > 0 and used > 0:
        yield range(epoch * size, epoch * size + min(used, left * batch * accumulation))
        if used == size and left >= in_epoch:
            return  # Every example has been visited.
        left, epoch = left - in_epoch, epoch + 1
