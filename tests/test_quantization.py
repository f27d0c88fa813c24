"""Rounded weights: by hand, beside torch, bitsandbytes and the definition of NF4; and QLoRA, four-bit in training.

Its base is four-bit in training and in full precision in negation. bitsandbytes has a CPU path.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from scipy.stats import norm
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import TINY_RUN, ModelMaker
from sku.config import ModelConfig, Precision, load_recipe
from sku.errors import ModelError, TaskVectorError
from sku.models import check_plain_weights, load_model
from sku.negate.task_vector import TaskVector
from sku.pipeline.run import run_recipe
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


def test_sixteen_bits_round_all_weights_where_they_hold_them(make_model: ModelMaker) -> None:
    model = make_model("llama_tied")
    for form, dtype in ((FORMATS["bf16"], torch.bfloat16), (FORMATS["fp16"], torch.float16)):
        copied = rounded_copy(model, form)
        assert copied is not None
        weights = dict(copied.named_parameters())
        for key, weight in model.named_parameters():
            assert torch.equal(weights[key], weight.to(dtype).float()), key
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] = 1e5
    assert rounded_copy(model, FORMATS["fp16"]) is None
    assert rounded_copy(model, FORMATS["bf16"]) is not None


@pytest.mark.parametrize(("architecture", "name"), [("llama_tied", "int8"), ("gpt2", "nf4")])
def test_linear_layers_are_rounded_and_nothing_else(
    make_model: ModelMaker, architecture: str, name: Precision
) -> None:
    """By outputs, also those of GPT-2, which hold their weights as [inputs, outputs]; a shared weight once."""
    model, rounding = make_model(architecture), FORMATS[name].rounding
    if architecture == "llama_tied":
        first, second = (layer.mlp for layer in model.model.layers)
        second.up_proj.weight = first.up_proj.weight
        assert len(rounded_layers(model)) == 2 * 7 - 1
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    copied = rounded_copy(model, FORMATS[name])
    assert copied is not None
    changed = {key: new for key, new in copied.state_dict().items() if not torch.equal(new, before[key])}
    shared = {"model.layers.1.mlp.up_proj.weight"} if architecture == "llama_tied" else set()
    assert set(changed) == {f"{layer}.weight" for layer in rounded_layers(model)} | shared
    for key, new in changed.items():
        old = before[key]
        assert torch.equal(new, rounding(old.T).T if architecture == "gpt2" else rounding(old)), key
    assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())
    assert not [key for key in changed if any(part in key for part in ("head", "embed", "norm", "wte", "wpe"))]


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose layers are multiples of the 64 weights of a quantization block, with our tokenizer."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = load_model("embedded").tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.integration
@pytest.mark.usefixtures("blank_pictures")
def test_a_four_bit_run_negates_the_adapter_on_the_full_precision_base(wide_model: Path, tmp_path: Path) -> None:
    recipe = load_recipe("embedded-paper", [f"model.path={wide_model}", "acquire.tuning=qlora", *TINY_RUN])
    run = run_recipe(recipe, tmp_path / "run")
    base, unlearned = load_model(wide_model).model, load_model(tmp_path / "run" / "unlearned").model
    check_plain_weights(unlearned, "unlearned")
    adapter = PeftModel.from_pretrained(base, str(tmp_path / "run" / "negated_adapter"))
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            adapter(input_ids=ids).logits, unlearned(input_ids=ids).logits, atol=1e-5, rtol=1e-5
        )
        assert not torch.equal(adapter.unload()(input_ids=ids).logits, unlearned(input_ids=ids).logits)
    assert json.loads((run.folder / "manifest.json").read_text())["status"] == "complete"


def test_four_bit_weights_are_really_four_bit_and_have_no_difference(wide_model: Path) -> None:
    model = load_model(ModelConfig(path=str(wide_model)), four_bit=True).model
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    assert len(layers) == 2 * 7
    with pytest.raises(ModelError, match="quantized"):
        check_plain_weights(model, "base")
    with pytest.raises(TaskVectorError, match="quantized"):
        TaskVector.between(model, model)
