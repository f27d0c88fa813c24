"""The real trainer of any method, on a tiny model and invented data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from conftest import ModelMaker
from sku.config import AcquireConfig
from sku.config.stages import Packing
from sku.data.batches import JointCollator
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


def terms_and_gradients(trainer: UnlearningTrainer, packing: Packing) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of three joint examples: the loss of each under each term, and the gradient of each trained weight."""
    dataset: Any = trainer.train_dataset
    model: Any = trainer.model
    tokenizer: Any = trainer.processing_class
    collate = JointCollator(
        packing, pad_token_id=tokenizer.pad_token_id, retain_tokens=trainer.objective.rows.retain_tokens
    )
    model.zero_grad()
    batch = collate([dataset[place] for place in range(3)])
    noted: dict[str, Tensor] = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sku.training.trainer.check_finite", lambda terms, *_: noted.update(terms))
        trainer.compute_loss(model, batch).backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return {name: losses_B.detach() for name, losses_B in noted.items()}, found


def disturb(trainer: UnlearningTrainer) -> None:
    """Moves the trained weights, so that the model in training is not the original one, and attention matters."""
    generator = torch.Generator().manual_seed(7)
    assert trainer.model is not None
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    trainer.model.eval()


def assert_packed_is_padded(trainer: UnlearningTrainer, packings: Sequence[Packing] = ("tree",)) -> None:
    """Losses and gradients of a model that has learned something, up to 1e-5."""
    disturb(trainer)
    terms, plain = terms_and_gradients(trainer, "padded")
    assert set(terms) == set(trainer.objective.weights)
    whole = torch.cat([gradient.flatten() for gradient in plain.values()]).norm()
    assert whole > 1e-4
    for packing in packings:
        packed_terms, packed = terms_and_gradients(trainer, packing)
        for term, losses_B in terms.items():
            assert float(losses_B.abs().min()) > 1e-6, f"{term} is at work"
            # A small divergence is a difference of log-probabilities of about 6 nats, and rounded as those are.
            assert (packed_terms[term] - losses_B).norm() <= 1e-5 * max(losses_B.norm(), 0.1), (packing, term)
        assert packed.keys() == plain.keys()
        for weight, gradient in plain.items():
            # Some gradients are 0 but for rounding: that of a key's bias, say.
            assert (packed[weight] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-2 * whole), (packing, weight)


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
