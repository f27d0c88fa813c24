"""What the file of a combined adapter holds: the product, and no way to one of its parts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conftest import ModelMaker
from negate.conftest import with_adapter
from sku.errors import TaskVectorError
from sku.negate.adapters import AdapterVector, combined, refactored
from sku.negate.arithmetic import LowRank

SHARES = ((0.08, 1.1), (1.0, 0.5))


def twins(base: Any, kind: str) -> tuple[AdapterVector, AdapterVector]:
    """Two adapters; with shared directions the good one has most of the bad one's A, as twins do that began alike."""
    bad = AdapterVector.of(with_adapter(base, r=4))
    good = AdapterVector.of(with_adapter(base, seed=2, r=6 if kind == "unequal ranks" else 4))
    if kind == "shared directions":
        for name, change in good.factors.items():
            change.lower_rI.mul_(0.3).add_(bad.factors[name].lower_rI)
            change.upper_Or[:, 0] = bad.factors[name].upper_Or[:, 0]
    return bad, good


def at_right_angles() -> tuple[AdapterVector, AdapterVector]:
    """The worst case: here the singular value decomposition parts the twins."""
    upper, _ = torch.linalg.qr(torch.randn(24, 8, generator=torch.Generator().manual_seed(0)))
    lower, _ = torch.linalg.qr(torch.randn(20, 8, generator=torch.Generator().manual_seed(1)))
    parts = (LowRank(upper_Or=upper[:, own], lower_rI=lower[:, own].T) for own in (slice(4), slice(4, 8)))
    bad, good = (AdapterVector(factors={"layer.weight": part}) for part in parts)
    return bad, good


def saved(vector: AdapterVector, folder: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Weight, B and A as the file holds them."""
    vector.save(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, change in vector.factors.items():
        upper, lower = change.file_names(name)
        yield name, tensors[upper], tensors[lower]


def missed(upper_Or: Tensor, lower_rI: Tensor, wanted_OI: Tensor) -> float:
    """``min_c || sum_i c_i b_i a_i^T - D || / || D ||``: the best that any choice and size of components does."""
    upper, lower, wanted = upper_Or.double(), lower_rI.double(), wanted_OI.double()
    parts = torch.einsum("or,ri->roi", upper, lower).flatten(1).T
    # The driver that also takes components without full rank.
    found = torch.linalg.lstsq(parts, wanted.reshape(-1, 1), driver="gelsd").solution
    return float((parts @ found - wanted.reshape(-1, 1)).norm() / wanted.norm())


def least_missed(upper_Or: Tensor, lower_rI: Tensor, wanted_OI: Tensor, rank: int) -> float:
    """The same, of whole file and blocks, and of blocks of A and B as they stand with one size."""
    found = [missed(upper_Or, lower_rI, wanted_OI)]
    starts = range(max(1, len(lower_rI) - rank + 1))
    for first, second in itertools.product(starts, repeat=2):
        upper, lower = upper_Or[:, first : first + rank], lower_rI[second : second + rank]
        found.append(missed(upper, lower, wanted_OI))
        whole = upper @ lower
        size = (whole * wanted_OI).sum() / whole.square().sum()
        found.append(float((size * whole - wanted_OI).norm() / wanted_OI.norm()))
    return min(found)


@pytest.mark.parametrize("kind", ["unequal ranks", "shared directions", "right angles"])
def test_no_twin_comes_back_from_the_file(kind: str, make_model: ModelMaker, tmp_path: Path) -> None:
    """At the recipes' shares; the factors side by side give the bad twin back from the first block."""
    bad, good = at_right_angles() if kind == "right angles" else twins(make_model(), kind)
    together = combined([(0.08, bad), (-1.1, good)])
    for name, upper, lower in saved(-1.375 * together, tmp_path / "adapter"):
        own, other = bad.factors[name], good.factors[name]
        wanted, rank = own.delta(), own.rank
        product = -1.375 * (0.08 * wanted.double() - 1.1 * other.delta().double())
        assert float((upper.double() @ lower.double() - product).norm() / product.norm()) < 1e-6, name
        assert least_missed(upper, lower, wanted, rank) > 0.5, name
        side_by_side = torch.cat([own.upper_Or, other.upper_Or], 1), torch.cat([own.lower_rI, other.lower_rI])
        assert least_missed(*side_by_side, wanted, rank) < 1e-5, name


@pytest.mark.parametrize("shares", SHARES)
def test_equal_products_have_equal_factors(shares: tuple[float, float]) -> None:
    """Nothing but the product is in them: another sum with the same product gives the same file."""
    bad, good = at_right_angles()
    own, other = bad.factors["layer.weight"], good.factors["layer.weight"]
    upper = torch.cat([shares[0] * own.upper_Or, -shares[1] * other.upper_Or * torch.arange(1, 5)], 1)
    upper[:, :4] *= torch.arange(2, 6)
    lower = torch.cat([own.lower_rI, other.lower_rI])
    turn = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    again = refactored(upper.double() @ turn, torch.linalg.solve(turn, lower.double()))
    for first, second in zip(refactored(upper, lower), again, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)


def test_the_numerical_rank_is_kept_and_the_factors_balanced() -> None:
    generator = torch.Generator().manual_seed(0)
    upper, lower = torch.randn(200, 64, generator=generator), torch.randn(64, 150, generator=generator)
    twice = refactored(torch.cat([0.5 * upper, upper], 1), torch.cat([lower, lower]))
    assert twice[0].shape == (200, 64)
    torch.testing.assert_close(twice[0].T @ twice[0], twice[1] @ twice[1].T, rtol=1e-3, atol=1e-2)
    product = 1.5 * upper.double() @ lower.double()
    assert float((twice[0].double() @ twice[1].double() - product).norm() / product.norm()) < 1e-6
    nothing = refactored(torch.zeros(5, 4), lower[:4])
    assert (nothing[0].shape, nothing[1].shape) == ((5, 1), (1, 150))
    assert not (nothing[0] @ nothing[1]).any()


def test_a_single_adapter_keeps_its_factors_and_what_is_not_finite_is_refused(make_model: ModelMaker) -> None:
    bad = AdapterVector.of(with_adapter(make_model()))
    for name, change in combined([(1.0, bad)]).factors.items():
        assert torch.equal(change.lower_rI, bad.factors[name].lower_rI)
    with pytest.raises(TaskVectorError, match="holds NaN or infinity"):
        combined([(float("inf"), bad), (1.0, bad)])
