"""Subtraction in pieces, from tensors to tensors."""

from __future__ import annotations

import copy

import pytest
import torch

from conftest import ModelMaker
from negate.conftest import disturbed
from sku.errors import TaskVectorError
from sku.negate import in_memory, stream_arithmetic
from sku.negate.in_memory import subtract_tensors
from sku.negate.run import negate, negate_with_record
from sku.negate.task_vector import TaskVector


def tensors(*, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in (("matrix", (7, 33)), ("vector", (5,)), ("scalar", ()), ("empty", (0, 3)))
    }


@pytest.mark.parametrize("pieces", [(4, 10), (10, 4), (1000, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_give_the_bits_of_whole_tensors(
    pieces: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that cut tensors anywhere, and pieces that cut blocks anywhere."""
    monkeypatch.setattr(in_memory, "BLOCK_ELEMENTS", pieces[0])
    monkeypatch.setattr(stream_arithmetic, "PIECE", pieces[1])
    base, bad, targets = tensors(seed=0), tensors(seed=1), tensors(seed=2, dtype=dtype)
    before = copy.deepcopy((base, bad))
    sums = subtract_tensors(base, bad, targets, 0.7, are_differences=False)
    for name, weight in base.items():
        wanted = -0.7 * (bad[name] - weight)
        assert torch.equal(targets[name], (weight + wanted).to(dtype)), name
    square = sum(float(((bad[name] - weight).double() ** 2).sum()) for name, weight in base.items())
    assert sums.difference == pytest.approx(square, rel=1e-6)
    for now, then in zip((base, bad), before, strict=True):
        assert all(torch.equal(now[name], then[name]) for name in then)


def test_a_target_that_is_no_plain_row_of_memory_is_written_too() -> None:
    base = {"matrix": torch.randn(4, 6, generator=torch.Generator().manual_seed(0))}
    target = {"matrix": torch.zeros(6, 4).T}
    subtract_tensors(base, {"matrix": torch.ones(6, 4).T}, target, 2.0, are_differences=True)
    assert torch.equal(target["matrix"], base["matrix"] - 2.0)


def test_a_whole_bad_model_is_subtracted_as_its_vector_is(make_model: ModelMaker) -> None:
    base = make_model("gemma3")
    bad = disturbed(base)
    whole, record = negate_with_record(base, bad, 1.3)
    by_vector, vector_record = negate_with_record(base, TaskVector.between(base, bad), 1.3)
    found = by_vector.state_dict()
    assert all(torch.equal(weight, found[name]) for name, weight in whole.state_dict().items())
    assert record == vector_record


def test_what_can_not_be_subtracted_is_refused_and_torch_gets_its_threads_back(make_model: ModelMaker) -> None:
    base = make_model()
    with pytest.raises(TaskVectorError, match="there is nothing to negate"):
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
