"""Losses and gradients that are not finite, looked at at once and a step late: no weight sees either."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import TrainerMaker
from sku.acquire.trainer import SkuTrainer
from sku.errors import NonFiniteLossError, RecipeError
from sku.training.finite import FiniteGuard


def weights_of(trainer: SkuTrainer) -> dict[str, Tensor]:
    assert trainer.model is not None
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def spoil(trainer: SkuTrainer, monkeypatch: pytest.MonkeyPatch, call: int) -> tuple[dict[str, Tensor], list[int]]:
    """Makes one example of one term NaN in one micro-batch; gives the weights as they are then, and the examples."""
    real = trainer._outputs_and_terms
    calls = 0
    weights: dict[str, Tensor] = {}
    ids: list[int] = []

    def broken(model: Any, inputs: Any) -> tuple[Any, dict[str, Tensor]]:
        nonlocal calls
        calls += 1
        outputs, terms = real(model, inputs)
        if calls == call:
            weights.update(weights_of(trainer))
            ids.extend([int(inputs["forget_index"][1]), int(inputs["retain_index"][1])])
            spoiled = terms["random_disassociation"].clone()
            spoiled[1] = torch.nan
            # The gradient is NaN as well, of every weight.
            terms["random_disassociation"] = spoiled * terms["random_disassociation"]
        return outputs, terms

    monkeypatch.setattr(trainer, "_outputs_and_terms", broken)
    return weights, ids


@pytest.mark.parametrize(("accumulation", "logging_steps"), [(1, 100), (2, 100), (1, 1)])
def test_late_no_weight_moves_either(
    accumulation: int, logging_steps: int, make_trainer: TrainerMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in the third micro-batch, so in step 3, or in the first half of step 2; the next look is in the step behind,
    before a line of the log, or at the end.
    """
    trainer = make_trainer(
        finite_check="late", max_steps=5, gradient_accumulation_steps=accumulation, logging_steps=logging_steps,
        reference="forward",
    )  # fmt: skip
    before, ids = spoil(trainer, monkeypatch, 3)
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train()
    step = 3 if accumulation == 1 else 2
    assert f"loss term random_disassociation is nan at step {step}" in str(caught.value)
    assert f"forget examples [{ids[0]}], retain examples [{ids[1]}]" in str(caught.value)
    after = weights_of(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert trainer.state.global_step == step
    assert trainer._guard.is_late
    optimizer: Any = trainer.optimizer
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    assert moments
    assert all(moment.isfinite().all() for moment in moments)


def test_late_the_last_step_is_looked_at_too(make_trainer: TrainerMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(finite_check="late", max_steps=3, logging_steps=100, reference="forward")
    before, _ = spoil(trainer, monkeypatch, 3)
    with pytest.raises(NonFiniteLossError, match="at step 3"):
        trainer.train()
    after = weights_of(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_late_nothing_is_saved_behind_it(
    make_trainer: TrainerMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trainer = make_trainer(
        finite_check="late", max_steps=4, logging_steps=100, reference="forward", save_strategy="steps", save_steps=1
    )
    spoil(trainer, monkeypatch, 2)
    with pytest.raises(NonFiniteLossError, match="at step 2"):
        trainer.train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-1"]


def test_late_nothing_is_saved_behind_it_at_the_end_of_an_epoch(
    make_trainer: TrainerMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Asked for behind the last of two steps, in which the NaN is."""
    trainer = make_trainer(
        finite_check="late", max_steps=-1, num_train_epochs=2, per_device_train_batch_size=3, logging_steps=100,
        reference="forward", save_strategy="epoch",
    )  # fmt: skip
    spoil(trainer, monkeypatch, 2)
    with pytest.raises(NonFiniteLossError, match="at step 2"):
        trainer.train()
    assert trainer.state.max_steps == 4
    assert not list((tmp_path / "checkpoints").glob("checkpoint-*"))


def test_late_and_at_once_train_the_same_bits(make_trainer: TrainerMaker) -> None:
    runs = []
    for mode in ("late", "at_once", "auto"):
        trainer = make_trainer(finite_check=mode, max_steps=3)
        trainer.train()
        assert trainer._guard.is_late is (mode == "late")
        runs.append(weights_of(trainer))
    assert all(torch.equal(runs[0][name], other[name]) for other in runs[1:] for name in other)


def test_a_nan_that_the_flag_would_not_stop_moves_weights(make_trainer: TrainerMaker) -> None:
    """The flag is what holds the update back: with it down, a gradient of NaN reaches the weights."""
    weight = nn.Parameter(torch.ones(2))
    optimizer: Any = torch.optim.AdamW([weight], fused=True)
    optimizer.found_inf = torch.ones(())
    weight.grad = torch.full((2,), torch.nan)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(2))
    optimizer.found_inf.zero_()
    optimizer.step()
    assert weight.isnan().all()


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda weights: torch.optim.AdamW(weights, fused=False), "AdamW is not fused"),
        (lambda weights: torch.optim.RMSprop(weights), "RMSprop is not fused"),
    ],
)
def test_an_optimizer_that_would_step_all_the_same_is_refused(optimizer: Callable[[Any], Any], message: str) -> None:
    guard = FiniteGuard("late")
    args = SimpleNamespace(fp16=False, device=torch.device("cpu"))
    with pytest.raises(RecipeError, match=f"finite_check is late, but {message}"):
        guard.on_train_begin(args, None, None, optimizer=optimizer([nn.Parameter(torch.ones(2))]))


def test_a_run_with_such_an_optimizer_is_refused(make_trainer: TrainerMaker) -> None:
    with pytest.raises(RecipeError, match="SGD is not fused"):
        make_trainer(finite_check="late", optim="sgd").train()
    with pytest.raises(RecipeError, match="finite_check is 'never'"):
        make_trainer(finite_check="never")


def test_adamw_is_fused_unless_told_otherwise(make_trainer: TrainerMaker) -> None:
    trainer = make_trainer()
    trainer.train()
    optimizer: Any = trainer.optimizer
    assert all(group["fused"] for group in optimizer.param_groups)


def spoil_gradient(trainer: SkuTrainer, monkeypatch: pytest.MonkeyPatch, call: int) -> dict[str, Tensor]:
    """Leaves every loss as it is and makes the gradient of one micro-batch infinite; gives the weights of that time.

    The root of 0 is 0, and its slope there infinite.
    """
    real = trainer._outputs_and_terms
    calls = 0
    weights: dict[str, Tensor] = {}

    def broken(model: Any, inputs: Any) -> tuple[Any, dict[str, Tensor]]:
        nonlocal calls
        calls += 1
        outputs, terms = real(model, inputs)
        if calls == call:
            weights.update(weights_of(trainer))
            term = terms["guided_distortion"]
            terms["guided_distortion"] = term + (term - term.detach()).sqrt()
        return outputs, terms

    monkeypatch.setattr(trainer, "_outputs_and_terms", broken)
    return weights


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("mode", ["late", "at_once"])
def test_a_gradient_that_is_not_finite_moves_no_weight(
    mode: str, accumulation: int, max_grad_norm: float, full: bool, make_trainer: TrainerMaker,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """In the third micro-batch, so in step 3, or in the first half of step 2; every loss is finite."""
    trainer = make_trainer(
        full=full, finite_check=mode, max_steps=4, gradient_accumulation_steps=accumulation, logging_steps=100,
        max_grad_norm=max_grad_norm, reference="copy" if full else "forward", save_strategy="steps", save_steps=1,
    )  # fmt: skip
    before = spoil_gradient(trainer, monkeypatch, 3)
    step = 3 if accumulation == 1 else 2
    with pytest.raises(NonFiniteLossError, match=f"the gradient is not finite at step {step}") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    after = weights_of(trainer)
    assert all(weight.isfinite().all() for weight in after.values())
    assert all(torch.equal(before[name], after[name]) for name in before)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"checkpoint-{saved}" for saved in range(1, step)]
    optimizer: Any = trainer.optimizer
    assert all(state["exp_avg"].isfinite().all() for state in optimizer.state.values())


@pytest.mark.parametrize("mode", ["late", "at_once"])
def test_a_bad_gradient_in_the_last_step_is_met_too(
    mode: str, make_trainer: TrainerMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(finite_check=mode, max_steps=2, logging_steps=100, reference="forward")
    before = spoil_gradient(trainer, monkeypatch, 2)
    with pytest.raises(NonFiniteLossError, match="the gradient is not finite at step 2"):
        trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(trainer).items())


@pytest.mark.parametrize(("value", "dtype"), [(1e30, torch.float32), (6e4, torch.float16)])
def test_a_large_gradient_is_finite_though_its_squares_are_not(value: float, dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(8, dtype=dtype))
    weight.grad = torch.full((8,), value, dtype=dtype)
    guard, args = FiniteGuard("at_once"), SimpleNamespace(fp16=False, device=torch.device("cpu"))
    optimizer, state = torch.optim.SGD([weight]), SimpleNamespace(global_step=0)
    guard.on_pre_optimizer_step(args, state, None, optimizer=optimizer)
    weight.grad[3] = torch.inf
    with pytest.raises(NonFiniteLossError, match="at step 1"):
        guard.on_pre_optimizer_step(args, state, None, optimizer=optimizer)


@pytest.mark.parametrize("mode", ["late", "at_once"])
def test_a_bad_gradient_of_another_process_stops_this_one_too(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are spread over processes: each looks at its own part, and all stop in the same step."""
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.AdamW([weight], fused=True)
    guard, args = FiniteGuard(mode), SimpleNamespace(fp16=False, device=torch.device("cpu"))
    state = SimpleNamespace(global_step=0)
    guard.on_train_begin(args, state, None, optimizer=optimizer)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flag, _operation: flag.fill_(1.0))

    def step() -> None:
        guard.on_pre_optimizer_step(args, state, None, optimizer=optimizer)
        optimizer.step()
        guard.settle()

    with pytest.raises(NonFiniteLossError, match="the gradient is not finite at step 1"):
        step()
    assert torch.equal(weight.detach(), torch.ones(2))


def test_a_gradient_that_the_scaler_of_fp16_will_skip_is_left_to_it() -> None:
    """An overflow is what its scale is found by; at a scale of 1 the gradient itself is not finite."""
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), torch.inf)
    guard, args = FiniteGuard("at_once"), SimpleNamespace(fp16=True, device=torch.device("cpu"))
    state = SimpleNamespace(global_step=6)
    for scale, stops in ((65536.0, False), (2.0, False), (1.0, True)):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(torch.ones(()))  # The scale stands only then.
        optimizer = SimpleNamespace(param_groups=[{"params": [weight]}], scaler=scaler)
        if stops:
            with pytest.raises(NonFiniteLossError, match="at step 7"):
                guard.on_pre_optimizer_step(args, state, None, optimizer=optimizer)
        else:
            guard.on_pre_optimizer_step(args, state, None, optimizer=optimizer)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_is_late_and_stops_before_any_weight_moves(
    make_trainer: TrainerMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(use_cpu=False, max_steps=5, logging_steps=100, reference="forward")
    before, _ = spoil(trainer, monkeypatch, 3)
    with pytest.raises(NonFiniteLossError, match="at step 3"):
        trainer.train()
    after = weights_of(trainer)
    assert trainer._guard.is_late
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_bad_gradient_is_met_late_too(make_trainer: TrainerMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(use_cpu=False, max_steps=5, logging_steps=100, reference="forward")
    before = spoil_gradient(trainer, monkeypatch, 3)
    with pytest.raises(NonFiniteLossError, match="the gradient is not finite at step 3"):
        trainer.train()
    assert trainer._guard.is_late
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(trainer).items())
