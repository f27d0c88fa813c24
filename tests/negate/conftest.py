"""Bad models, dense ones and ones with an adapter, and how near one comes to a twin."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

IDS = torch.tensor([[5, 40, 41, 200, 7, 8], [9, 12, 100, 101, 102, 3]])
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def logits_of(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits


def assert_same_bits(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Equal down to the sign of zero."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor.dtype, tensor.shape) == (second[name].dtype, second[name].shape), name
        integers = _INTEGERS[tensor.element_size()]
        assert torch.equal(tensor.view(integers), second[name].view(integers)), name


def disturbed(model: Any, *, scale: float = 0.1, seed: int = 1) -> Any:
    """A copy with noise on every weight; ties stay."""
    bad = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in bad.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return bad


def with_adapter(model: Any, *, seed: int = 1, **settings: Any) -> PeftModel:
    """A copy with a LoRA adapter that has learned something."""
    options: dict[str, Any] = {
        "r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM",
    }  # fmt: skip
    torch.manual_seed(seed)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**(options | settings)))
    assert isinstance(adapted, PeftModel)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "lora_embedding_" in name:
                parameter.normal_(std=0.2)
    adapted.eval()
    return adapted


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
