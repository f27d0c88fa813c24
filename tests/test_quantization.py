"""Rounded weights: against hand calculations, torch, bitsandbytes, and the definition of NF4."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import norm

from conftest import ModelMaker
from sku.config import Precision
from sku.quantization import FORMATS, NF4_BLOCK, NF4_CODE, int8_rounded, nf4_rounded, rounded_copy, rounded_layers


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_int8_by_hand_and_as_torch_rounds() -> None:
    weight = torch.tensor([[127.0, 1.4, -1.6, 0.0], [0.0, 0.0, 0.0, 0.0], [-2.54, 0.011, 1.255, 0.029]])
    expected = torch.tensor([[127.0, 1.0, -2.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-2.54, 0.02, 1.26, 0.02]])
    torch.testing.assert_close(int8_rounded(weight), expected)
    weight = normal(24, 40)
    scale, zeros = weight.abs().amax(1) / 127, torch.zeros(24, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(weight, scale, zeros, 0, -127, 127)
    torch.testing.assert_close(int8_rounded(weight), expected)


def test_the_code_book_is_the_papers() -> None:
    """Quantiles of the normal distribution: 7 below zero, 8 above, and zero, scaled to -1 and 1."""
    offset = 0.9677083
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    values = np.sort([*negative, 0.0, *positive])
    np.testing.assert_allclose(NF4_CODE, values / values.max(), atol=1e-6)


def test_nf4_by_hand() -> None:
    """Two blocks: one of 64 whose largest magnitude is 2, and a short one of zeros and a 0.5."""
    weight = torch.zeros(1, NF4_BLOCK + 3)
    weight[0, :4] = torch.tensor([2.0, -1.9, 0.3, 0.05])
    weight[0, -1] = -0.5
    expected = torch.zeros(1, NF4_BLOCK + 3)
    # 0.15 lies nearest to 0.1609, 0.025 nearest to 0, -0.95 nearest to -1.
    expected[0, :4] = torch.tensor([2.0, -2.0, 2 * 0.16093020141124725, 0.0])
    expected[0, -1] = -0.5
    torch.testing.assert_close(nf4_rounded(weight), expected)
    assert torch.equal(nf4_rounded(torch.zeros(2, 5)), torch.zeros(2, 5))


# Its CPU kernel gives other values for some rows that no block divides, such as 96 x 160, while flat they agree.
@pytest.mark.parametrize("shape", [(128, 128), (3, 50)])
def test_nf4_is_that_of_bitsandbytes_which_a_gpu_rounds_with(shape: tuple[int, int]) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = normal(*shape)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4")
    assert torch.equal(nf4_rounded(weight), bitsandbytes.functional.dequantize_4bit(packed, state))
    rounding, name = FORMATS["nf4"].on(torch.device("cuda"))
    assert name == f"bitsandbytes {bitsandbytes.__version__}"
    assert torch.equal(rounding(weight), nf4_rounded(weight))
    assert FORMATS["nf4"].on(torch.device("cpu")) == (nf4_rounded, "sku")
    assert FORMATS["int8"].on(torch.device("cuda")) == (int8_rounded, "sku")


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_sixteen_bits_round_all_weights_and_tell_how_many(make_model: ModelMaker, name: Precision) -> None:
    """Counts by hand, tied weights once; one weight is beyond float16."""
    model = make_model("llama_tied")
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] = 1e5
    form = FORMATS[name]
    with rounded_copy(model, form.rounding, layers_only=form.layers_only) as (copied, rounded):
        assert rounded.rounded == model.num_parameters()
        assert rounded.overflowed == (1 if name == "fp16" else 0)
        weights = dict(copied.named_parameters())
        moved = 0
        for key, weight in model.named_parameters():
            assert torch.equal(weights[key], form.rounding(weight)), key
            moved += int((weights[key] != weight).sum())
        assert rounded.moved == moved > 0


@pytest.mark.parametrize("architecture", ["llama_tied", "opt", "gpt2"])
@pytest.mark.parametrize("rounding", [int8_rounded, nf4_rounded])
def test_linear_layers_are_rounded_and_nothing_else(
    make_model: ModelMaker, architecture: str, rounding: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """By outputs, also those of GPT-2, which hold their weights as [inputs, outputs]; a shared weight once."""
    model = make_model(architecture)
    if architecture == "llama_tied":
        first, second = (layer.mlp for layer in model.model.layers)
        second.up_proj.weight = first.up_proj.weight
        assert len(rounded_layers(model)) == 2 * 7 - 1
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with rounded_copy(model, rounding) as (copied, _):
        changed = {name: new for name, new in copied.state_dict().items() if not torch.equal(new, before[name])}
        assert copied.get_output_embeddings().weight is not model.get_output_embeddings().weight
    shared = {"model.layers.1.mlp.up_proj.weight"} if architecture == "llama_tied" else set()
    assert set(changed) == {f"{name}.weight" for name in rounded_layers(model)} | shared
    for name, new in changed.items():
        old = before[name]
        assert torch.equal(new, rounding(old.T).T if architecture == "gpt2" else rounding(old)), name
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not [name for name in changed if any(part in name for part in ("head", "embed", "norm", "wte", "wpe"))]
