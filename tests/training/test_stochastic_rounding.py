"""Updates too small for bfloat16: lost when rounded to the nearest, kept on average when rounded at random."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import ModelMaker, TrainerMaker
from sku.errors import RecipeError
from sku.training.optimizer import StochasticAdamW, round_to_bfloat16

STEP = 2.0**-7
"""Between bfloat16 numbers from 1 to 2."""


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_mean_is_the_value_and_each_draw_a_neighbour(sign: int) -> None:
    """1 + 0.3 steps goes up in 30 % of 100,000 draws; the standard error of the share is 0.0015."""
    values = torch.full((100_000,), sign * (1 + 0.3 * STEP))
    rounded = round_to_bfloat16(values, generator()).float()
    assert set(rounded.unique().tolist()) == {sign * 1.0, sign * (1.0 + STEP)}
    assert float((rounded.abs() > 1).float().mean()) == pytest.approx(0.3, abs=0.01)


def test_what_bfloat16_holds_stays_as_it_is() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-130, torch.inf, -torch.inf, torch.finfo(torch.bfloat16).max])
    rounded = round_to_bfloat16(values, generator())
    assert torch.equal(rounded.float(), values)
    assert torch.equal(rounded.signbit(), values.signbit())
    assert round_to_bfloat16(torch.tensor([torch.nan]), generator()).isnan().all()


def updated(optimizer_class: Any, steps: int, **options: Any) -> Tensor:
    """Weights of 1 after steps that are each 1/10 of what bfloat16 can tell there."""
    weight = nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    optimizer = optimizer_class([weight], lr=STEP / 10, weight_decay=0.0, **options)
    for _ in range(steps):
        weight.grad = torch.full_like(weight, -1.0)
        optimizer.step()
    return weight.detach().float()


def test_small_updates_add_up_on_average_and_are_lost_without() -> None:
    """Adam with an unchanging gradient moves by the learning rate: 20 steps of 1/10 are 2 of bfloat16's."""
    assert float(updated(StochasticAdamW, 20).mean()) == pytest.approx(1 + 2 * STEP, abs=0.05 * STEP)
    assert torch.equal(updated(torch.optim.AdamW, 20), torch.ones(20_000))
    assert torch.equal(updated(torch.optim.AdamW, 20, fused=True), torch.ones(20_000))


def test_equal_seeds_round_equally_and_others_do_not() -> None:
    first = updated(StochasticAdamW, 3, seed=1)
    torch.manual_seed(99)
    assert torch.equal(first, updated(StochasticAdamW, 3, seed=1))
    assert not torch.equal(first, updated(StochasticAdamW, 3, seed=2))


def test_float32_weights_get_what_adamw_gives_them() -> None:
    weights = [nn.Parameter(torch.linspace(-1, 1, 9)) for _ in range(2)]
    optimizers: list[Any] = [StochasticAdamW([weights[0]], lr=0.1), torch.optim.AdamW([weights[1]], lr=0.1)]
    for scale in (1.0, -2.0, 0.5):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = torch.linspace(0, scale, 9)
            optimizer.step()
    assert torch.equal(*weights)


@pytest.mark.integration
def test_a_training_run_in_bfloat16_rounds_at_random_and_resumes_with_the_same_bits(
    make_trainer: TrainerMaker, make_model: ModelMaker, tmp_path: Any
) -> None:
    common: dict[str, Any] = {
        "full": True, "stochastic_rounding": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 2,
        "learning_rate": 1e-5,
    }  # fmt: skip

    def trained(resume: bool | str = False, **changes: Any) -> dict[str, Tensor]:
        trainer = make_trainer(make_model().to(torch.bfloat16), **(common | changes))
        trainer.train(resume_from_checkpoint=resume or None)
        optimizer: Any = trainer.optimizer
        if trainer.args.stochastic_rounding:  # type: ignore[attr-defined]
            assert all(state["exp_avg"].dtype == torch.float32 for state in optimizer.state.values())
        assert trainer.model is not None
        return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}

    whole = trained()
    resumed = trained(str(tmp_path / "checkpoints" / "checkpoint-2"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    start = dict(make_model().to(torch.bfloat16).named_parameters())

    def moved(weights: dict[str, Tensor]) -> float:
        changed = sum(int((weights[name] != start[name]).sum()) for name in weights if weights[name].dim() == 2)
        return changed / sum(weight.numel() for weight in weights.values() if weight.dim() == 2)

    assert moved(whole) > 1.5 * moved(trained(stochastic_rounding=False, save_strategy="no"))


def test_where_it_would_do_nothing_it_is_refused(make_trainer: TrainerMaker) -> None:
    with pytest.raises(RecipeError, match="those that are trained are float32"):
        make_trainer(full=True, stochastic_rounding=True)
    with pytest.raises(RecipeError, match="stochastic_rounding is AdamW's, and optim is sgd"):
        make_trainer(full=True, stochastic_rounding=True, optim="sgd")
