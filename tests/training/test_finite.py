"""Losses and gradients that are not finite: no weight sees either."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import TrainerMaker, weights_of
from sku.errors import NonFiniteLossError, ProcessError
from sku.methods.trainer import SkuTrainer
from sku.training.objective import FiniteGuard, check_finite


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
            ids.extend([int(inputs["forget_index"][1]), int(inputs["retain_rows"][1])])
            spoiled = terms["random_disassociation"].clone()
            spoiled[1] = torch.nan
            # The gradient is NaN as well, of every weight.
            terms["random_disassociation"] = spoiled * terms["random_disassociation"]
        return outputs, terms

    monkeypatch.setattr(trainer, "_outputs_and_terms", broken)
    return weights, ids


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


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize(("full", "accumulation"), [(False, 2), (True, 1)])
def test_no_weight_moves(
    what: str, full: bool, accumulation: int, make_trainer: TrainerMaker, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Bad in the third micro-batch: in step 3, or in the first half of step 2."""
    trainer = make_trainer(
        full=full, max_steps=4, gradient_accumulation_steps=accumulation, logging_steps=100,
        reference_cache_mb=0.0, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    ids: list[int] = []
    if what == "loss":
        before, ids = spoil(trainer, monkeypatch, 3)
    else:
        before = spoil_gradient(trainer, monkeypatch, 3)
    step = 3 if accumulation == 1 else 2
    with pytest.raises(NonFiniteLossError, match=f"at step {step}") as caught:
        trainer.train()
    if ids:
        assert "random_disassociation is nan" in str(caught.value)
        assert f"[{ids[0]}], retain examples [{ids[1]}]" in str(caught.value)
    assert "\n" not in str(caught.value)
    after = weights_of(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"checkpoint-{saved}" for saved in range(1, step)]
    optimizer: Any = trainer.optimizer
    assert all(state["exp_avg"].isfinite().all() for state in optimizer.state.values())


def test_another_process_that_stops_stops_this_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are spread over processes: each looks at its own part, and all stop in the same step."""
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.AdamW([weight], fused=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flag, _operation: flag.fill_(1.0))
    args, state = SimpleNamespace(fp16=False, device=torch.device("cpu")), SimpleNamespace(global_step=0)
    with pytest.raises(NonFiniteLossError, match="at step 1"):
        FiniteGuard().on_pre_optimizer_step(args, state, None, optimizer=optimizer)
    with pytest.raises(ProcessError, match="at step 5"):
        check_finite({"term": torch.ones(2)}, {}, 5)


@pytest.mark.parametrize(("value", "dtype"), [(1e30, torch.float32), (6e4, torch.float16)])
def test_a_large_gradient_is_finite_though_its_squares_are_not(value: float, dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(8, dtype=dtype))
    weight.grad = torch.full((8,), value, dtype=dtype)
    guard, args = FiniteGuard(), SimpleNamespace(fp16=False, device=torch.device("cpu"))
    optimizer, state = torch.optim.SGD([weight]), SimpleNamespace(global_step=0)
    guard.on_pre_optimizer_step(args, state, None, optimizer=optimizer)
    weight.grad[3] = torch.inf
    with pytest.raises(NonFiniteLossError, match="at step 1"):
        guard.on_pre_optimizer_step(args, state, None, optimizer=optimizer)


def test_a_gradient_that_the_scaler_of_fp16_will_skip_is_left_to_it() -> None:
    """An overflow is what its scale is found by; at a scale of 1 the gradient itself is not finite."""
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), torch.inf)
    guard, args = FiniteGuard(), SimpleNamespace(fp16=True, device=torch.device("cpu"))
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
