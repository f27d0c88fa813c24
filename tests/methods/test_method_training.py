"""Every method through the real trainer, on a tiny model."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from methods.conftest import MethodTrainerMaker, small_settings
from sku.data.batches import ROWS, JointCollator, SourceRow
from sku.data.examples import ForgetRetainData, RowType
from sku.data.tokens import TokenizedExample
from sku.errors import DataError
from sku.methods import METHODS, method_named
from sku.methods.base import AnyMethod
from sku.training.trainer import UnlearningTrainer


def trainable(trainer: UnlearningTrainer) -> dict[str, Tensor]:
    assert trainer.model is not None
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize(
    ("method", "full"),
    [*((method, False) for method in METHODS), (METHODS[0], True)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_two_steps_are_finite_and_move_the_weights(
    method: AnyMethod, full: bool, make_method_trainer: MethodTrainerMaker
) -> None:
    trainer = make_method_trainer(method, full=full)
    before = trainable(trainer)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2
    for line in lines:
        terms = {name.removeprefix("loss/") for name in line if name.startswith("loss/")}
        assert terms == set(trainer.objective.weights)
        assert all(math.isfinite(line[name]) for name in line if name.startswith("loss"))
        weighted = sum(weight * line[f"loss/{name}"] for name, weight in trainer.objective.weights.items())
        assert line["loss"] == pytest.approx(weighted, rel=1e-3, abs=1e-3)
    after = trainable(trainer)
    assert any(not torch.equal(after[name], weight) for name, weight in before.items())
    assert all(weight.isfinite().all() for weight in after.values())


def disturb(trainer: UnlearningTrainer) -> None:
    """Gives lora_B values, so that the model in training is not the original one."""
    generator = torch.Generator().manual_seed(7)
    assert trainer.model is not None
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def terms_of(trainer: UnlearningTrainer, *, extra_padding: int) -> dict[str, Tensor]:
    dataset: Any = trainer.train_dataset
    assert isinstance(trainer.data_collator, JointCollator)
    batch = trainer.data_collator([dataset[0], dataset[1]])
    if extra_padding:
        length = batch["input_ids"].shape[1] + extra_padding
        longer = TokenizedExample(input_ids=(1,) * length, labels=(-100,) * length, answer_start=length)
        rows = [*batch[ROWS].rows, SourceRow(kind=cast(RowType, 99), example=0, tokens=longer)]
        batch[ROWS] = trainer.data_collator.lay_out(rows, 2)
    model: Any = trainer.model
    model.eval()
    with torch.no_grad():
        return trainer._outputs_and_terms(model, batch)[1]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_padding_changes_no_loss(method: AnyMethod, make_method_trainer: MethodTrainerMaker) -> None:
    # At its own beta SimNPO has nothing left to do on a random model, whose answers are unlikely as they are.
    settings = small_settings(method, **({"beta": 0.1} if method.name == "simnpo" else {}))
    trainer = make_method_trainer(method, settings=settings)
    disturb(trainer)
    tight, wide = terms_of(trainer, extra_padding=0), terms_of(trainer, extra_padding=19)
    assert set(tight) == set(trainer.objective.weights)
    for name, losses in tight.items():
        torch.testing.assert_close(wide[name], losses, rtol=1e-4, atol=1e-6, msg=name)
        assert float(losses.abs().min()) > 1e-5, f"{name} is at work"


def test_dpo_stops_where_the_data_has_no_safe_answer(
    make_method_trainer: MethodTrainerMaker, data: ForgetRetainData
) -> None:
    with pytest.raises(DataError, match="safe answer"):
        make_method_trainer(method_named("dpo"), dataset=data)


def test_dpo_trains_only_on_prompts_that_have_a_safe_answer(
    make_method_trainer: MethodTrainerMaker, safe_data: ForgetRetainData
) -> None:
    dataset: Any = make_method_trainer(method_named("dpo")).train_dataset
    with_answer = {index for index, example in enumerate(safe_data.forget_train) if example.safe_answer is not None}
    assert {dataset[place].forget_index for place in range(len(dataset))} == with_answer
    assert len(with_answer) == len(safe_data.forget_train) - 1
