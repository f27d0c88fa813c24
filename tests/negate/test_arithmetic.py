"""Subtraction in pieces, from tensors to tensors; sums that float32 holds or not; stochastic rounding."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import ModelMaker
from negate.conftest import disturbed
from sku.errors import TaskVectorError
from sku.negate import arithmetic
from sku.negate.arithmetic import dot_in_cache, round_stochastically, subtract_tensors
from sku.negate.task_vector import negate


def some_tensors(*, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in (("matrix", (7, 33)), ("vector", (5,)), ("scalar", ()), ("empty", (0, 3)))
    }


@pytest.mark.parametrize(("pieces", "dtype"), [((4, 10), torch.float32), ((10, 4), torch.bfloat16)])
def test_pieces_give_the_bits_of_whole_tensors(
    pieces: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that cut tensors anywhere, and pieces that cut blocks anywhere."""
    monkeypatch.setattr(arithmetic, "BLOCK_ELEMENTS", pieces[0])
    monkeypatch.setattr(arithmetic, "PIECE", pieces[1])
    base, bad, targets = some_tensors(seed=0), some_tensors(seed=1), some_tensors(seed=2, dtype=dtype)
    before = copy.deepcopy((base, bad))
    sums = subtract_tensors(base, bad, targets, 0.7, are_differences=False)
    for name, weight in base.items():
        wanted = -0.7 * (bad[name] - weight)
        assert torch.equal(targets[name], (weight + wanted).to(dtype)), name
    square = sum(float(((bad[name] - weight).double() ** 2).sum()) for name, weight in base.items())
    assert sums.difference == pytest.approx(square, rel=1e-6)
    for now, then in zip((base, bad), before, strict=True):
        assert all(torch.equal(now[name], then[name]) for name in then)


def test_what_can_not_be_subtracted_is_refused_and_torch_gets_its_threads_back(make_model: ModelMaker) -> None:
    base = make_model()
    with pytest.raises(TaskVectorError):
        negate(base, copy.deepcopy(base))
    broken = disturbed(base)
    with torch.no_grad():
        broken.lm_head.weight[3, 3] = float("nan")
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(TaskVectorError, match=r"lm_head\.weight"):
            negate(base, broken)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


# Sums.


@pytest.mark.parametrize("scale", [1e-38, 1e-3, 3e37])
def test_squares_of_any_size_are_counted(scale: float) -> None:
    """Squares of 1e-30 vanish in float32, those of 1e30 overflow."""
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * scale
    assert dot_in_cache(values, values) == pytest.approx(math.fsum((values.double() ** 2).tolist()), rel=1e-5, abs=0)


def test_what_is_not_finite_shows_in_the_sum() -> None:
    for number in (math.nan, math.inf):
        values, others = torch.ones(1000), torch.zeros(1000)
        values[999] = number
        assert not any(math.isfinite(dot_in_cache(values, other)) for other in (values, others))


# Stochastic rounding: one of two neighbours, without bias.


def test_a_quarter_of_a_step_is_taken_a_quarter_of_the_time() -> None:
    """Between 1 and 1 + 2^-7 bfloat16 has nothing; 1 + 2^-9 lies at a quarter, 1 + 3 2^-9 at three."""
    for sign, quarters in ((1.0, 1), (-1.0, 3)):
        draws = torch.arange(64) / 64
        values = round_stochastically(torch.full_like(draws, sign * (1 + quarters * 2**-9)), torch.bfloat16, draws)
        assert set(values.tolist()) == {sign, sign * (1 + 2**-7)}
        assert int((values != sign).sum()) == 16 * quarters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(bits=st.integers(0, 2**16 - 1), draw=st.floats(0, 1, exclude_max=True, width=32))
def test_what_the_type_has_is_kept(bits: int, draw: float, dtype: torch.dtype) -> None:
    value = torch.tensor([bits - 2**15], dtype=torch.int16).view(dtype)
    if value.isfinite():
        kept = round_stochastically(value.float(), dtype, torch.tensor([draw]))
        assert torch.equal(kept.view(torch.int16), value.view(torch.int16))
