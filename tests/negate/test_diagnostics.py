"""What rounding leaves of a change, by hand."""

from __future__ import annotations

import pytest
import torch

from conftest import ModelMaker
from sku.errors import TaskVectorError
from sku.negate.diagnostics import model_survival
from sku.negate.run import negate
from sku.negate.task_vector import TaskVector

DOWN = "model.layers.0.mlp.down_proj.weight"


def test_a_change_below_half_a_step_is_gone(make_model: ModelMaker) -> None:
    """bfloat16 has steps of 2^-8 below 1 and 2^-7 above, float16 of 2^-11 and 2^-10: 1 - 2^-10 is a float16 number and
    rounds to 1 in bfloat16. With one value a channel, 8 and 4 bits hold each exactly: nothing is lost there.
    """
    base = make_model()
    with torch.no_grad():
        base.get_parameter(DOWN).fill_(1.0)
    vector = TaskVector({DOWN: torch.full_like(base.get_parameter(DOWN), 2.0**-10)})
    found = model_survival(base, negate(base, vector))
    assert (found["bf16"]["changed"], found["bf16"]["tensors"], found["bf16"]["entries"]) == (
        0.0,
        {DOWN: 0.0},
        32 * 48,
    )
    for form in ("fp16", "int8", "nf4"):
        assert (found[form]["changed"], found[form]["projection"]) == (1.0, pytest.approx(1.0, abs=1e-3)), form
    assert model_survival(base, negate(base, vector, 4.0))["bf16"]["projection"] == 1.0, "four times is a step"
    assert model_survival(base, base)["int8"]["entries"] == 0
    with pytest.raises(TaskVectorError):
        model_survival(make_model("opt"), base)
