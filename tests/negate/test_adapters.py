"""Adapters kept in factors: saved, loaded by plain PEFT, and compared with dense arithmetic in logits."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from conftest import ModelMaker
from negate.conftest import logits_of, with_adapter
from sku.errors import TaskVectorError
from sku.negate.adapters import AdapterVector, combined
from sku.negate.arithmetic import LowRank
from sku.negate.task_vector import TaskVector, negate


def loaded(base: Any, folder: Path) -> PeftModel:
    model = PeftModel.from_pretrained(base, str(folder))
    assert isinstance(model, PeftModel)
    return model


def architecture_options(architecture: str) -> dict[str, Any]:
    return {"fan_in_fan_out": True} if architecture == "gpt2" else {}


@pytest.mark.parametrize("architecture", ["llama_tied", "gpt2"])
def test_a_saved_combination_is_the_dense_one(architecture: str, make_model: ModelMaker, tmp_path: Path) -> None:
    """Ranks 4 and 3, different scalings and coefficients: 0.7 tau_1 - 1.3 tau_2 as one adapter of rank 7."""
    base = make_model(architecture)
    options = architecture_options(architecture)
    first, second = with_adapter(base, **options), with_adapter(base, seed=2, r=3, lora_alpha=9, **options)
    together = combined([(0.7, AdapterVector.of(first)), (-1.3, AdapterVector.of(second))])
    one, other = (TaskVector.from_factors(AdapterVector.of(adapter)).deltas for adapter in (first, second))
    dense = TaskVector({name: 0.7 * delta - 1.3 * other[name] for name, delta in one.items()})
    together.save(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (7, 7, {})
    by_adapter = logits_of(loaded(make_model(architecture), tmp_path / "adapter"))
    torch.testing.assert_close(by_adapter, logits_of(negate(base, -dense)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(by_adapter, logits_of(base), atol=1e-3)


def test_adapters_of_different_modules(make_model: ModelMaker, tmp_path: Path) -> None:
    """One adapts q and v, the other v and the MLP: v has the sum of the ranks, the others keep theirs."""
    base = make_model()
    first = with_adapter(base, target_modules=["q_proj", "v_proj"])
    second = with_adapter(base, seed=2, r=2, target_modules=["v_proj", "up_proj"])
    together = combined([(-1.0, AdapterVector.of(first)), (-0.5, AdapterVector.of(second))])
    ranks = {name.split(".")[-2]: len(change.lower_rI) for name, change in together.factors.items()}
    assert ranks == {"q_proj": 4, "v_proj": 6, "up_proj": 2}
    together.save(tmp_path / "adapter")
    dense = TaskVector.from_factors(together)
    torch.testing.assert_close(
        logits_of(loaded(make_model(), tmp_path / "adapter")),
        logits_of(negate(base, -dense)),
        rtol=1e-4,
        atol=1e-5,
    )


def test_adapters_of_two_models_and_infinite_ones_are_refused(make_model: ModelMaker, tmp_path: Path) -> None:
    first = AdapterVector.of(with_adapter(make_model()))
    name, change = next(iter(first.factors.items()))
    wide = AdapterVector(factors={name: LowRank(upper_Or=change.upper_Or, lower_rI=torch.ones(4, 5))})
    with pytest.raises(TaskVectorError, match=name):
        combined([(1.0, first), (1.0, wide)])
    with pytest.raises(TaskVectorError):
        (float("inf") * first).save(tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "narrowed",
    [
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.0\..*"},
    ],
)  # fmt: skip
def test_only_the_adapted_layers_are_named(narrowed: dict[str, Any], make_model: ModelMaker, tmp_path: Path) -> None:
    base = make_model()
    bad = AdapterVector.of(with_adapter(base, **narrowed))
    (-1.0 * bad).save(tmp_path / "one")
    by_adapter = logits_of(loaded(make_model(), tmp_path / "one"))
    expected = logits_of(negate(base, TaskVector.from_factors(bad), 1.0))
    torch.testing.assert_close(by_adapter, expected, rtol=1e-4, atol=1e-5)
    other = AdapterVector.of(with_adapter(base, seed=2, **narrowed))
    combined([(1.0, bad), (0.5, other)]).save(tmp_path / "two")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        loaded(make_model(), tmp_path / "two")
