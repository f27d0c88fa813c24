"""Adapters kept in factors: saved, loaded by plain PEFT, compared with dense arithmetic; and no way from the file of a
combined one to one of its parts.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from conftest import ModelMaker
from negate.conftest import least_missed, logits_of, with_adapter
from sku.errors import TaskVectorError
from sku.negate.adapters import AdapterVector, combined, refactored
from sku.negate.arithmetic import LowRank
from sku.negate.task_vector import TaskVector, negate


def assert_adds(vector: AdapterVector, base: Any, folder: Path) -> None:
    """Plain PEFT adds it to the original model."""
    vector.save(folder)
    dense = logits_of(negate(base, -TaskVector.from_factors(vector)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        by_adapter = logits_of(PeftModel.from_pretrained(base, str(folder)))
    torch.testing.assert_close(by_adapter, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama_tied", "gpt2"])
def test_a_saved_combination_is_the_dense_one(architecture: str, make_model: ModelMaker, tmp_path: Path) -> None:
    """Ranks 4 and 3, different scalings and coefficients: 0.7 tau_1 - 1.3 tau_2 as one adapter of rank 7."""
    base = make_model(architecture)
    options: dict[str, Any] = {"fan_in_fan_out": True} if architecture == "gpt2" else {}
    first, second = with_adapter(base, **options), with_adapter(base, seed=2, r=3, lora_alpha=9, **options)
    together = combined([(0.7, AdapterVector.of(first)), (-1.3, AdapterVector.of(second))])
    one, other = (TaskVector.from_factors(AdapterVector.of(adapter)).deltas for adapter in (first, second))
    for name, delta in TaskVector.from_factors(together).deltas.items():
        torch.testing.assert_close(delta, 0.7 * one[name] - 1.3 * other[name], rtol=1e-4, atol=1e-6)
    assert_adds(together, make_model(architecture), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (7, 7, {})


def test_adapters_of_different_or_narrowed_modules(make_model: ModelMaker, tmp_path: Path) -> None:
    """One adapts q and v, the other v and the MLP: v has the sum of the ranks, the others keep theirs."""
    base = make_model()
    first = with_adapter(base, target_modules=["q_proj", "v_proj"])
    second = with_adapter(base, seed=2, r=2, target_modules=["v_proj", "up_proj"])
    together = combined([(-1.0, AdapterVector.of(first)), (-0.5, AdapterVector.of(second))])
    ranks = {name.split(".")[-2]: len(change.lower_rI) for name, change in together.factors.items()}
    assert ranks == {"q_proj": 4, "v_proj": 6, "up_proj": 2}
    assert_adds(together, make_model(), tmp_path / "modules")
    narrowed = with_adapter(base, target_modules=["q_proj", "up_proj"], layers_to_transform=[1])
    assert_adds(-1.0 * AdapterVector.of(narrowed), make_model(), tmp_path / "layers")


def test_adapters_of_two_models_and_infinite_ones_are_refused(make_model: ModelMaker, tmp_path: Path) -> None:
    first = AdapterVector.of(with_adapter(make_model()))
    name, change = next(iter(first.factors.items()))
    wide = AdapterVector(factors={name: LowRank(upper_Or=change.upper_Or, lower_rI=torch.ones(4, 5))})
    for terms in ([(1.0, first), (1.0, wide)], [(float("inf"), first), (1.0, first)]):
        with pytest.raises(TaskVectorError, match=name):
            combined(terms)
    with pytest.raises(TaskVectorError):
        (float("inf") * first).save(tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


# What the file holds: the product.


def twins(base: Any) -> tuple[AdapterVector, AdapterVector]:
    """Two adapters; the good one has most of the bad one's A, as twins do that began alike."""
    bad, good = AdapterVector.of(with_adapter(base, r=4)), AdapterVector.of(with_adapter(base, seed=2, r=4))
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


@pytest.mark.parametrize("kind", ["shared directions", "right angles"])
def test_no_twin_comes_back_from_the_file(kind: str, make_model: ModelMaker, tmp_path: Path) -> None:
    """At the recipes' shares; the factors side by side give the bad twin back from the first block."""
    bad, good = at_right_angles() if kind == "right angles" else twins(make_model())
    vector = -1.375 * combined([(0.08, bad), (-1.1, good)])
    vector.save(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, change in vector.factors.items():
        upper, lower = (tensors[place] for place in change.file_names(name))
        own, other = bad.factors[name], good.factors[name]
        wanted, rank = own.delta(), own.rank
        product = -1.375 * (0.08 * wanted.double() - 1.1 * other.delta().double())
        assert float((upper.double() @ lower.double() - product).norm() / product.norm()) < 1e-6, name
        assert least_missed(upper, lower, wanted, rank) > 0.5, name
        side_by_side = torch.cat([own.upper_Or, other.upper_Or], 1), torch.cat([own.lower_rI, other.lower_rI])
        assert least_missed(*side_by_side, wanted, rank) < 1e-5, name


def test_equal_products_have_equal_factors() -> None:
    """Nothing but the product is in them: another sum with the same product gives the same file."""
    bad, good = at_right_angles()
    own, other = bad.factors["layer.weight"], good.factors["layer.weight"]
    upper = torch.cat([0.08 * own.upper_Or, -1.1 * other.upper_Or * torch.arange(1, 5)], 1)
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
    nothing = refactored(torch.zeros(5, 4), lower[:4])
    assert (nothing[0].shape, nothing[1].shape) == ((5, 1), (1, 150))
    assert not (nothing[0] @ nothing[1]).any()
