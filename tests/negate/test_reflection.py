"""What docs/limits.md says of reflection: original and unlearned weights together give back the bad model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from conftest import ModelMaker
from negate.conftest import disturbed, logits_of
from sku.negate.task_vector import TaskVector, negate, negate_with_record


def reflected(base: Any, unlearned: Any, alpha: float) -> Any:
    """``theta_o + (theta_o - theta_u) / alpha``: the subtraction itself, of the unlearned model."""
    return negate(base, unlearned, 1 / alpha)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_reflection_is_the_bad_model_up_to_rounding(alpha: float, make_model: ModelMaker) -> None:
    base = make_model("llama_tied")
    bad = disturbed(base)
    again = reflected(base, negate(base, bad, alpha), alpha)
    weights, original, found = bad.state_dict(), base.state_dict(), again.state_dict()
    for name, weight in weights.items():
        # A few roundings of float32, of weights as large as the larger model's.
        size = torch.maximum(weight.abs(), original[name].abs()) + alpha * (weight - original[name]).abs()
        assert bool(((found[name] - weight).abs() <= 4 * 2.0**-24 * size * (1 + 1 / alpha)).all()), name
    torch.testing.assert_close(logits_of(again), logits_of(bad), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits_of(again), logits_of(base), atol=1e-2)
    if alpha == 1.0:
        name = "model.layers.0.mlp.up_proj.weight"
        torch.testing.assert_close(found[name], 2 * original[name] - negate(base, bad).state_dict()[name])


def test_of_rounded_weights_comes_back_what_survived_the_rounding(make_model: ModelMaker) -> None:
    """On the whole the share of the vector that returns is ``survival``; what it returns in is coarser."""
    stored: Any = make_model()
    stored.to(torch.bfloat16)
    exact: Any = copy.deepcopy(stored)
    exact.to(torch.float32)
    vector = TaskVector.between(exact, disturbed(exact, scale=2e-5))
    unlearned: Any
    unlearned, record = negate_with_record(stored, vector)
    assert 0.01 < record.survival < 0.95
    again = TaskVector.between(exact, reflected(exact, unlearned.to(torch.float32), 1.0))
    product = sum(float((again.deltas[name] * delta).sum()) for name, delta in vector.deltas.items())
    assert product / vector.norm() ** 2 == pytest.approx(record.survival, rel=1e-3)
