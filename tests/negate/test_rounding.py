"""Stochastic rounding: one of two neighbours, without bias."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sku.negate.rounding import draws_for, round_stochastically

SHORT = [torch.bfloat16, torch.float16]


def rounded(value: float, dtype: torch.dtype, draws: Tensor) -> Tensor:
    return round_stochastically(torch.full_like(draws, value), dtype, draws).float()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_quarter_of_a_step_is_taken_a_quarter_of_the_time(sign: float) -> None:
    """Between 1 and 1 + 2^-7 bfloat16 has nothing; 1 + 2^-9 lies at a quarter."""
    values = rounded(sign * (1 + 2**-9), torch.bfloat16, torch.arange(64) / 64)
    assert set(values.tolist()) == {sign, sign * (1 + 2**-7)}
    assert int((values != sign).sum()) == 16
    values = rounded(sign * (1 + 3 * 2**-9), torch.bfloat16, torch.arange(64) / 64)
    assert int((values != sign).sum()) == 48, "also where the nearest is the upper one"


@pytest.mark.parametrize("dtype", SHORT)
def test_below_a_power_of_two_the_step_is_the_smaller_one(dtype: torch.dtype) -> None:
    step = torch.finfo(dtype).eps / 2
    values = rounded(1 - step / 4, dtype, torch.arange(64) / 64)
    assert set(values.tolist()) == {1.0, 1 - step}
    assert int((values != 1).sum()) == 16


@pytest.mark.parametrize("dtype", SHORT)
def test_around_zero(dtype: torch.dtype) -> None:
    smallest = float(torch.tensor([1], dtype=torch.int16).view(dtype))
    for sign in (1, -1):
        values = rounded(sign * smallest / 4, dtype, torch.arange(64) / 64)
        assert set(values.tolist()) == {0.0, sign * smallest}
        assert int((values != 0).sum()) == 16
    kept = round_stochastically(torch.tensor([-0.0, 0.0]), dtype, torch.zeros(2))
    assert torch.signbit(kept).tolist() == [True, False]


@pytest.mark.parametrize("dtype", SHORT)
@given(bits=st.integers(0, 2**16 - 1), draw=st.floats(0, 1, exclude_max=True, width=32))
def test_what_the_type_has_is_kept(bits: int, draw: float, dtype: torch.dtype) -> None:
    value = torch.tensor([bits - 2**15], dtype=torch.int16).view(dtype)
    if value.isfinite():
        kept = round_stochastically(value.float(), dtype, torch.tensor([draw]))
        assert torch.equal(kept.view(torch.int16), value.view(torch.int16))


@pytest.mark.parametrize("dtype", SHORT)
@given(value=st.floats(-6e4, 6e4, width=32), draw=st.floats(0, 1, exclude_max=True, width=32))
def test_always_a_neighbour(value: float, draw: float, dtype: torch.dtype) -> None:
    exact = torch.tensor([value])
    result = round_stochastically(exact, dtype, torch.tensor([draw]))
    nearest = exact.to(dtype)
    around = {float(nearest), *(float(step) for step in steps_around(nearest))}
    assert float(result) in around
    assert abs(float(result) - value) <= max(abs(step - float(nearest)) for step in around)


def steps_around(value: Tensor) -> tuple[Tensor, Tensor]:
    infinity = torch.full_like(value, float("inf"))
    return torch.nextafter(value, infinity), torch.nextafter(value, -infinity)


def test_the_mean_is_the_value() -> None:
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)) * 0.02
    total = torch.zeros(200, dtype=torch.float64)
    for block in range(2000):
        total += round_stochastically(values, torch.bfloat16, draws_for(0, "w", block, 200)).double()
    steps = (2.0**-8) * values.abs()
    assert float(((total / 2000 - values.double()).abs() / steps).max()) < 0.1


def test_draws_depend_on_seed_name_and_block_alone() -> None:
    first = draws_for(1, "a", 0, 10)
    assert torch.equal(first, draws_for(1, "a", 0, 10))
    for other in (draws_for(2, "a", 0, 10), draws_for(1, "b", 0, 10), draws_for(1, "a", 1, 10)):
        assert not torch.equal(first, other)
    assert first.min() >= 0
    assert first.max() < 1
