r"""The training of the attack ``relearn``: a copy of a model, fine-tuned on harmful pairs and looked at on the way.

Nothing of it is stage 1's but what is trained: all weights where ``acquire.tuning`` is ``full``, else a LoRA adapter
of fixed shape (``LORA``, dropout 0). Cross-entropy on the answers alone, ``PAIRS_AT_ONCE`` pairs a step in the order
of the seed, AdamW at a constant learning rate without warm-up or weight decay, the gradient's norm cut at 1. So a
training of 256 steps holds the shorter ones, and a recipe's schedule changes no figure.

The copy answers harmful prompts on purpose. It is never saved: it lives in memory, training's folder is private and
empty, and both are gone when the last look is over.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from sku.attacks.kinds import AttackContext
from sku.config import AcquireConfig, Recipe, plain_data
from sku.config.stages import LoraSettings, Tuning
from sku.data.examples import ForgetExample
from sku.methods.task_vector import TASK_VECTOR
from sku.models import LoadedModel
from sku.training.config import UnlearningConfig, training_settings
from sku.training.run import adapter_settings, train

PAIRS_AT_ONCE = 8
LORA = LoraSettings(r=16, alpha=32, target_modules="all-linear")
_OF_MACHINE = ("bf16", "fp16", "use_cpu", "activation_checkpointing", "gradient_checkpointing", "logits_budget_mb")
"""Settings of ``acquire.training`` that are kept: they say how a step is computed, not what it does."""

Look = Callable[[int, PreTrainedModel], bool]
"""Called with the steps so far and the model; true ends the training."""


def tuning_of(recipe: Recipe) -> Tuning:
    """What is trained. Four-bit weights only save memory for stage 1; the model here is already loaded whole."""
    return "full" if recipe.acquire.tuning == "full" else "lora"


def attack_training(recipe: Recipe) -> dict[str, Any]:
    """Settings of a training but for its rate and length, as ``training_settings`` takes them."""
    return {
        **{name: value for name, value in recipe.acquire.training.items() if name in _OF_MACHINE},
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "per_device_train_batch_size": PAIRS_AT_ONCE,
        # As the model is asked between two steps, its attention stays its own.
        "packing": "padded",
        "save_strategy": "no",
    }


def training_details(recipe: Recipe) -> dict[str, Any]:
    """All that decides the weights but model, pairs, learning rate, steps and seed, as plain data."""
    tuning = tuning_of(recipe)
    return {
        "tuning": tuning,
        **({} if tuning == "full" else {"lora": plain_data(LORA)}),
        "max_length": recipe.data.max_length,
        "max_answer_tokens": recipe.data.max_answer_tokens,
        "training": attack_training(recipe),
    }


def fine_tune(
    model: PreTrainedModel,
    pairs: Sequence[ForgetExample],
    learning_rate: float,
    steps: Sequence[int],
    context: AttackContext,
    look: Look,
) -> None:
    """Fine-tunes a copy of a model on harmful pairs, and shows it after some steps.

    Args:
        model: It is not changed.
        pairs: What is trained on.
        learning_rate: Constant.
        steps: Optimizer steps after which ``look`` is called, the last of all at the end; one or more, ascending.
        context: For the recipe, the tokenizer and progress.
        look: It may ask the model, and must not change it.

    Raises:
        DataError: No pair leaves an answer token to train on.
        NonFiniteLossError: The loss is NaN or infinite.
    """
    recipe, tuning = context.recipe, tuning_of(context.recipe)
    copied = copy.deepcopy(model)
    if tuning == "full":
        copied = copied.float()  # In half precision a step of usual size rounds away on most weights.
    with tempfile.TemporaryDirectory(prefix="sku-relearn-") as folder:
        settings = training_settings(
            UnlearningConfig,
            {**attack_training(recipe), "learning_rate": learning_rate, "max_steps": steps[-1]},
            {
                "output_dir": folder,
                "seed": recipe.seed,
                "max_length": recipe.data.max_length,
                "max_answer_tokens": recipe.data.max_answer_tokens,
            },
            device=copied.device.type,
        )
        train(
            LoadedModel(model=copied, tokenizer=context.tokenizer, name="relearned", revision=None),
            dataclasses.replace(context.data, forget_train=tuple(pairs)),
            TASK_VECTOR.objective(TASK_VECTOR.settings(), copied),
            settings,
            tuning=tuning,
            adapter=adapter_settings(AcquireConfig(tuning=tuning, lora=LORA)),
            folder=Path(folder),
            prompt_format=recipe.model.prompt_format,
            callbacks=[_Looks(frozenset(steps), look, context)],
            hazardous=True,
        )


class _Looks(TrainerCallback):
    """Looks at the model between two steps."""

    def __init__(self, steps: frozenset[int], look: Look, context: AttackContext) -> None:
        self._steps, self._look, self._progress = steps, look, context.progress

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Called by the trainer."""
        if self._progress is not None:
            self._progress("attack relearn: steps", state.global_step, state.max_steps)
        if state.global_step in self._steps and self._look(state.global_step, model):
            control.should_training_stop = True
