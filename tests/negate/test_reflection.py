"""What docs/limits.md says of reflection: original and unlearned weights together give back the bad model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import ModelMaker
from negate.conftest import disturbed, logits_of
from sku.negate.task_vector import negate


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
