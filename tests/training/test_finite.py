"""Losses and gradients that are not finite: no weight sees either."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import TrainerMaker, assert_same_bits, weights_of
from sku.errors import NonFiniteLossError, ProcessError
from sku.methods.trainer import SkuTrainer
from sku.training.objective import FiniteGuard, check_finite

Weights = dict[str, Tensor]


def spoil(trainer: SkuTrainer, what: str, call: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Weights, list[int]]:
    """Spoils one micro-batch, and gives the weights as they are then, and the examples whose loss is bad.

    One example of one term is NaN (``loss``); or every loss is as it is, and the gradient infinite: the root of 0 is
    0, and its slope there infinite.
    """
    real = trainer._outputs_and_terms
    calls = 0
    weights: Weights = {}
    ids: list[int] = []

    def broken(model: Any, inputs: Any) -> tuple[Any, dict[str, Tensor]]:
        nonlocal calls
        calls += 1
        outputs, terms = real(model, inputs)
        if calls == call:
            weights.update(weights_of(trainer))
            term = terms["random_disassociation"]
            if what == "loss":
                ids.extend([int(inputs["forget_index"][1]), int(inputs["retain_rows"][1])])
                # The gradient is NaN as well, of every weight.
                terms["random_disassociation"] = term * torch.tensor([1.0, torch.nan])
            else:
                terms["random_disassociation"] = term + (term - term.detach()).sqrt()
        return outputs, terms

    monkeypatch.setattr(trainer, "_outputs_and_terms", broken)
    return weights, ids


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
    before, ids = spoil(trainer, what, 3, monkeypatch)
    step = 3 if accumulation == 1 else 2
    with pytest.raises(NonFiniteLossError, match=f"at step {step}") as caught:
        trainer.train()
    assert ("random_disassociation" in str(caught.value)) == (what == "loss")
    assert all(f"[{index}]" in str(caught.value) for index in ids)
    assert_same_bits(before, weights_of(trainer))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"checkpoint-{saved}" for saved in range(1, step)]
    optimizer: Any = trainer.optimizer
    assert all(state["exp_avg"].isfinite().all() for state in optimizer.state.values())


def look_at(weight: nn.Parameter, scaler: Any = None) -> None:
    optimizer = SimpleNamespace(param_groups=[{"params": [weight]}], scaler=scaler)
    state = SimpleNamespace(global_step=6)
    FiniteGuard().on_pre_optimizer_step(SimpleNamespace(device=weight.device), state, None, optimizer=optimizer)


def test_another_process_that_stops_stops_this_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are spread over processes: each looks at its own part, and all stop in the same step."""
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flag, _operation: flag.fill_(1.0))
    with pytest.raises(NonFiniteLossError, match="at step 7"):
        look_at(weight)
    with pytest.raises(ProcessError, match="at step 5"):
        check_finite({"term": torch.ones(2)}, {}, 5)


@pytest.mark.parametrize(("value", "dtype"), [(1e30, torch.float32), (6e4, torch.float16)])
def test_a_large_gradient_is_finite_though_its_squares_are_not(value: float, dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(8, dtype=dtype))
    weight.grad = torch.full((8,), value, dtype=dtype)
    look_at(weight)
    weight.grad[3] = torch.inf
    with pytest.raises(NonFiniteLossError):
        look_at(weight)


def test_a_gradient_that_the_scaler_of_fp16_will_skip_is_left_to_it() -> None:
    """An overflow is what its scale is found by; at a scale of 1 the gradient itself is not finite."""
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), torch.inf)
    for scale in (65536.0, 2.0, 1.0):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(torch.ones(()))  # The scale stands only then.
        with pytest.raises(NonFiniteLossError) if scale == 1 else nullcontext():
            look_at(weight, scaler)
