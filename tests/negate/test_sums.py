"""Sums of products that float32 holds, and those that it doesn't."""

from __future__ import annotations

import math

import pytest
import torch

from sku.negate.sums import PIECE, dot_in_cache


def exact(first: torch.Tensor, second: torch.Tensor) -> float:
    return math.fsum((first.double() * second.double()).tolist())


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-12, 1e-3, 1.0, 1e12, 1e30, 3e37])
def test_squares_of_any_size_are_counted(scale: float) -> None:
    """Squares of 1e-30 vanish in float32, those of 1e30 overflow."""
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * scale
    assert dot_in_cache(values, values) == pytest.approx(exact(values, values), rel=1e-5, abs=0)


def test_one_tiny_number_among_zeros_is_not_nothing() -> None:
    values = torch.zeros(1000)
    assert dot_in_cache(values, values) == 0.0
    for tiny in (1e-45, -1e-30):
        values[17] = tiny
        assert dot_in_cache(values, values) == pytest.approx(torch.tensor(tiny).double().item() ** 2, rel=1e-9, abs=0)
    assert dot_in_cache(torch.zeros(0), torch.zeros(0)) == 0.0


def test_products_that_cancel_are_summed_in_float64() -> None:
    first, second = torch.tensor([3.0e4, 1.0, -3.0e4]), torch.tensor([1.0e4, 1.0, 1.0e4])
    assert float(first[0] * second[0] + 1) == 3.0e8, "float32 loses the 1"
    assert dot_in_cache(first, second) == 1.0


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_the_sum(number: float) -> None:
    values, others = torch.ones(1000), torch.zeros(1000)
    values[999] = number
    assert not math.isfinite(dot_in_cache(values, values))
    assert not math.isfinite(dot_in_cache(values, others))
    assert not math.isfinite(dot_in_cache(others, values))


@pytest.mark.parametrize("kind", ["normal", "equal"])
def test_a_whole_piece_is_right_to_one_part_in_10_000(kind: str) -> None:
    """Equal numbers are the worst: each rounding errs in the same direction."""
    values = torch.randn(PIECE, generator=torch.Generator().manual_seed(0)) if kind == "normal" else torch.ones(PIECE)
    values = values * 0.1
    assert dot_in_cache(values, values) == pytest.approx(exact(values, values), rel=1e-4)
