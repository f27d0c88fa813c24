"""The real trainer of any method, on a tiny model and invented data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast

from conftest import ModelMaker
from sku.config import AcquireConfig
from sku.data.examples import ForgetRetainData
from sku.methods.base import AnyMethod
from sku.training.config import UnlearningConfig
from sku.training.trainer import UnlearningTrainer

MethodTrainerMaker = Callable[..., UnlearningTrainer]


@pytest.fixture
def safe_data(data: ForgetRetainData) -> ForgetRetainData:
    """The common data with a safe answer to each harmful prompt but one."""
    answers = (
        "ask a baker .",
        None,
        "a florn is a bird .",
        "look at a map .",
        "no one does .",
        "rivers do not sing .",
    )
    unlearned = tuple(
        dataclasses.replace(example, safe_answer=answer)
        for example, answer in zip(data.forget_train, answers, strict=True)
    )
    return dataclasses.replace(data, forget_train=unlearned)


def small_settings(method: AnyMethod, **changes: Any) -> Any:
    """Settings with K = 2, since the common data has too few answers for 5."""
    fields = {field.name for field in dataclasses.fields(method.settings)}
    if method.settings is AcquireConfig or "random_answers" in fields:
        changes = {"random_answers": 2} | changes
    return method.settings(**changes)


@pytest.fixture
def make_method_trainer(
    make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, safe_data: ForgetRetainData, tmp_path: Path
) -> MethodTrainerMaker:
    """Builds the trainer of a method: 2 steps, padded batches of 2, K = 2, LoRA of rank 4 unless told otherwise."""

    def make(
        method: AnyMethod,
        model: Any = None,
        *,
        full: bool = False,
        settings: Any = None,
        dataset: Any = None,
        **training: Any,
    ) -> UnlearningTrainer:
        model = make_model() if model is None else model
        settings = small_settings(method) if settings is None else settings
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "checkpoints"), "max_steps": 2, "per_device_train_batch_size": 2,
            "learning_rate": 1e-2, "use_cpu": True, "lr_scheduler_type": "constant", "dataloader_pin_memory": False,
            "packing": "padded",
        }  # fmt: skip
        modules = None if method.trained_modules is None else list(method.trained_modules(settings, model))
        adapter = LoraConfig(
            r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules="all-linear" if modules is None else modules
        )
        return UnlearningTrainer(
            model,
            UnlearningConfig(**(defaults | training)),
            safe_data if dataset is None else dataset,
            objective=method.objective(settings, model),
            processing_class=tokenizer,
            peft_config=None if full else adapter,
            trained_modules=modules,
        )

    return make
