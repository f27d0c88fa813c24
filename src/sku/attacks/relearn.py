"""Relearning: a few steps of fine-tuning on a few harmful pairs. What was removed must be learned anew.

Papers: arXiv 2406.13356 (Hu et al., relearning attacks), 2410.08827 (Deeb and Roger, facts that come back untaught).
The pairs are of the split ``forget_train`` and the questions of ``forget_test``, so that no answer is taught that is
asked for. Fine-tuning may still teach more than it brings back: the base model goes through the same training, with
the same pairs, order, seed and steps, as a control. A relearned model answers harmful prompts on purpose. It is never
saved: it lives in memory, training's folder is private and empty, and both are gone when the replies are written.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from sku.attacks.base import Attack, AttackContext, Setting
from sku.attacks.results import AttackCard
from sku.config import Recipe, plain_data
from sku.data.examples import ForgetExample, content_hash
from sku.evaluate.asking import draw_examples
from sku.methods.task_vector import TASK_VECTOR
from sku.models import LoadedModel
from sku.training.config import UnlearningConfig, training_settings
from sku.training.run import adapter_settings, step_progress, train


@contextmanager
def relearned(
    model: PreTrainedModel, pairs: list[ForgetExample], context: AttackContext
) -> Iterator[PreTrainedModel | PeftModel]:
    """A copy of a model, fine-tuned on harmful pairs as the recipe trains: its tuning, learning rate and batch size.

    Args:
        model: It is not changed.
        pairs: What is trained on, by cross-entropy on the answers alone.
        context: For the recipe, the tokenizer and progress.

    Yields:
        The copy, in evaluation mode. Hazardous.

    Raises:
        DataError: No pair leaves an answer token to train on.
        NonFiniteLossError: The loss is NaN or infinite.
    """
    recipe = context.recipe
    # Four-bit weights only save memory for stage 1; the model here is already loaded whole.
    acquire = recipe.acquire if recipe.acquire.tuning == "full" else dataclasses.replace(recipe.acquire, tuning="lora")
    copied = copy.deepcopy(model)
    if acquire.tuning == "full":
        copied = copied.float()  # In half precision a step of usual size rounds away on most weights.
    with tempfile.TemporaryDirectory(prefix="sku-relearn-") as folder:
        settings = training_settings(
            UnlearningConfig,
            relearn_training(recipe),
            {
                "output_dir": folder,
                "seed": recipe.seed,
                "max_length": recipe.data.max_length,
                "max_answer_tokens": recipe.data.max_answer_tokens,
            },
            device=copied.device.type,
        )
        trained = train(
            LoadedModel(model=copied, tokenizer=context.tokenizer, name="relearned", revision=None),
            dataclasses.replace(context.data, forget_train=tuple(pairs)),
            TASK_VECTOR.objective(TASK_VECTOR.settings(), copied),
            settings,
            tuning=acquire.tuning,
            adapter=adapter_settings(acquire),
            folder=Path(folder),
            prompt_format=recipe.model.prompt_format,
            callbacks=step_progress(_steps(context)),
            hazardous=True,
        )
        yield trained.model


def relearn_training(recipe: Recipe) -> dict[str, Any]:
    """The recipe's training settings with the attack's own number of steps, without warm-up and checkpoints."""
    # A recipe's warm-up is sized for its own steps, and could fill all of these.
    kept = {name: value for name, value in recipe.acquire.training.items() if name != "warmup_ratio"}
    return {**kept, "max_steps": recipe.evaluate.relearn_steps, "warmup_steps": 0, "save_strategy": "no"}


def _steps(context: AttackContext) -> Any:
    progress = context.progress
    return None if progress is None else lambda _stage, done, total: progress("attack relearn: steps", done, total)


def _settings(context: AttackContext) -> list[Setting]:
    recipe = context.recipe
    lora = {} if recipe.acquire.tuning == "full" else {"lora": plain_data(recipe.acquire.lora)}
    drawn: dict[int, list[ForgetExample]] = {}
    for wanted in recipe.evaluate.relearn_pairs:
        pairs = draw_examples(context.data.forget_train, wanted, seed=recipe.seed)
        drawn.setdefault(len(pairs), pairs)  # Fewer where there are fewer, and the name says so.
    return [
        Setting(
            name=f"{number} pair{'s' if number > 1 else ''}",
            change=partial(relearned, pairs=pairs, context=context),
            details={
                "pairs": number,
                "pairs_sha256": content_hash(pairs),
                "steps": recipe.evaluate.relearn_steps,
                "tuning": recipe.acquire.tuning,
                **lora,
                "max_length": recipe.data.max_length,
                "max_answer_tokens": recipe.data.max_answer_tokens,
                "training": relearn_training(recipe),
            },
        )
        for number, pairs in drawn.items()
    ]


RELEARN = Attack(
    card=AttackCard(
        name="relearn",
        title="Relearning",
        kind="weights",
        changes="the model is fine-tuned for a few steps on a few harmful pairs, none of which is asked",
        source_url="https://arxiv.org/abs/2406.13356",
    ),
    settings=_settings,
)
