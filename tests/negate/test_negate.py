"""The subtraction: theta_u = theta_o - alpha * (theta_bad - theta_o)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from conftest import ModelMaker
from negate.conftest import assert_same_bits, disturbed, logits_of, with_adapter
from sku.errors import ModelError, OutputError, RecipeError, TaskVectorError
from sku.model_files import embedded_model_path
from sku.models import LoadedModel
from sku.negate.streaming import FolderNegation
from sku.negate.task_vector import TaskVector, base_as_files, negate, save_unlearned, subtract_into, task_vector_of


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_each_weight_by_the_equation(make_model: ModelMaker) -> None:
    base = make_model()
    bad = disturbed(base)
    unlearned = negate(base, bad, 2.5)
    bad_weights, unlearned_weights = bad.state_dict(), unlearned.state_dict()
    for name, weight in base.state_dict().items():
        expected = weight - 2.5 * (bad_weights[name] - weight)
        torch.testing.assert_close(unlearned_weights[name], expected, rtol=1e-6, atol=1e-7, msg=name)
    assert not unlearned.training
    assert all(parameter.requires_grad for parameter in unlearned.parameters())


def test_tied_weights_are_subtracted_exactly_once(make_model: ModelMaker) -> None:
    """Every weight of the bad model is 0.5 more, so every weight of the result is 0.5 less, and not 1.0."""
    base = make_model("llama_tied")
    bad = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in bad.parameters():
            parameter.add_(0.5)
    unlearned: Any = negate(base, bad)
    assert unlearned.get_output_embeddings().weight is unlearned.get_input_embeddings().weight
    original = base.state_dict()
    for name, weight in unlearned.state_dict().items():
        torch.testing.assert_close(weight, original[name] - 0.5, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_reflection_is_the_bad_model_up_to_rounding(alpha: float, make_model: ModelMaker) -> None:
    """As docs/limits.md says: ``theta_o + (theta_o - theta_u) / alpha`` is the subtraction of the unlearned model."""
    base = make_model("llama_tied")
    bad = disturbed(base)
    weights, original = bad.state_dict(), base.state_dict()
    for name, found in negate(base, negate(base, bad, alpha), 1 / alpha).state_dict().items():
        # A few roundings of float32, of weights as large as the larger model's.
        bad_weight, weight = weights[name], original[name]
        size = torch.maximum(bad_weight.abs(), weight.abs()) + alpha * (bad_weight - weight).abs()
        assert bool(((found - bad_weight).abs() <= 4 * 2.0**-24 * size * (1 + 1 / alpha)).all()), name


def test_alpha_0_gives_the_original_bit_for_bit(make_model: ModelMaker) -> None:
    """-0.0 - 0 * x would be +0.0 for x < 0."""
    base = make_model()
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight[0] = -0.0
    unlearned = negate(base, disturbed(base), 0.0)
    assert_same_bits(bits_of(base), bits_of(unlearned))


def test_neither_base_nor_bad_model_is_touched(make_model: ModelMaker) -> None:
    base = make_model("llama_tied")
    for bad in (disturbed(base), with_adapter(base)):
        before, bad_before = bits_of(base), bits_of(bad)
        unlearned = negate(base, bad)
        with torch.no_grad():
            for parameter in unlearned.parameters():
                parameter.zero_()
        assert_same_bits(before, bits_of(base))
        assert_same_bits(bad_before, bits_of(bad))


def test_bfloat16_loses_a_part_of_a_small_change_and_says_so(make_model: ModelMaker) -> None:
    """Changes below half a bfloat16 step, 2e-3 to 4e-3 of the value, are rounded away."""
    rounded = make_model().to(torch.bfloat16)
    exact = copy.deepcopy(rounded).float()
    generator = torch.Generator().manual_seed(0)
    for relative, low, high in ((1e-1, 0.98, 1.02), (2e-3, 0.2, 0.97), (1e-4, -0.01, 0.05)):
        bad = copy.deepcopy(exact)
        with torch.no_grad():
            for parameter in bad.parameters():
                parameter.mul_(1 + relative * torch.randn(parameter.shape, generator=generator))
        vector = TaskVector.between(exact, bad)
        assert low < subtract_into(copy.deepcopy(rounded), rounded, vector, 1.0).survival < high
    kept = subtract_into(copy.deepcopy(exact), rounded, vector, 1.0)
    assert round(kept.survival, 3) == 1.0
    assert kept.base == pytest.approx(
        sum(float((own.detach().double() ** 2).sum()) for own in exact.parameters()), rel=1e-5
    )
    assert kept.difference == pytest.approx(1e-8 * kept.base, rel=0.4)


def test_what_is_refused(make_model: ModelMaker) -> None:
    base, tied = make_model(), make_model("llama_tied")
    up = "model.layers.0.mlp.up_proj.weight"
    delta = torch.zeros_like(base.state_dict()[up])
    delta[0, 0] = -1e5  # The largest number of float16 is 65,504.
    with_lora, packed = make_model(), make_model()
    get_peft_model(with_lora, LoraConfig(target_modules=["q_proj"]))
    packed.lm_head.weight = nn.Parameter(torch.ones(320, 32, dtype=torch.int8), requires_grad=False)
    of_base, of_tied = TaskVector.between(base, disturbed(base)), TaskVector.between(tied, disturbed(tied))
    half: dict[str, Any] = {"output_dtype": torch.float16}
    cases: tuple[tuple[Any, Any, dict[str, Any], type[Exception], str], ...] = (
        (base, TaskVector({up: delta}), half, TaskVectorError, up),
        (base, of_base, {"alpha": float("nan")}, RecipeError, "alpha"),
        (base, of_base, {"alpha": -1.0}, RecipeError, "alpha"),
        (tied, of_base, {}, TaskVectorError, "lm_head.weight"),
        (base, of_tied, {}, TaskVectorError, "lm_head.weight"),
        (make_model(vocab_size=333), of_base, {}, TaskVectorError, "embed_tokens"),
        (with_lora, of_base, {}, TaskVectorError, "adapter"),
        (packed, of_base, {}, ModelError, "lm_head.weight"),
    )
    for original, bad, options, error, key in cases:
        with pytest.raises(error, match=key):
            negate(original, bad, **options)
    negate(base, TaskVector({up: delta}))


@pytest.mark.parametrize("alpha", [1.0, 0.0])
def test_an_original_weight_that_overflows_is_refused(alpha: float, make_model: ModelMaker) -> None:
    """In a tensor that the vector leaves alone, and at alpha 0 in one that it changes."""
    base = make_model()
    up, down = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
    vector = TaskVector({up: torch.ones_like(base.state_dict()[up])})
    with torch.no_grad():
        base.state_dict()[down if alpha else up][0, 0] = 1e5
    negate(base, vector, alpha, output_dtype=torch.bfloat16)
    with pytest.raises(TaskVectorError, match=r"proj\.weight"):
        negate(base, vector, alpha, output_dtype=torch.float16)
    if not alpha:  # What the vector takes into the range is no overflow.
        vector.deltas[up][0, 0] = 9e4
        negate(base, vector, output_dtype=torch.float16)


def test_models_of_folders_and_a_saved_result(
    make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """``test_streaming.py`` compares the other forms."""
    base = make_model()
    adapter = with_adapter(base)
    adapter.save_pretrained(str(tmp_path / "adapter"))
    expected = logits_of(negate(base, adapter))
    assert torch.equal(logits_of(negate(base, tmp_path / "adapter")), expected)
    assert task_vector_of(base, tmp_path / "adapter").norm() == task_vector_of(base, adapter).norm() > 0
    with pytest.raises(ModelError, match="nothing"):
        negate(base, tmp_path / "nothing")
    save_unlearned(negate(base, adapter), tokenizer, tmp_path / "unlearned")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "unlearned")), expected)
    assert (tmp_path / "unlearned" / "tokenizer.json").is_file()
    with pytest.raises(OutputError, match="unlearned"):
        save_unlearned(base, tokenizer, tmp_path / "unlearned")


def test_folders_are_negated_in_the_type_of_their_files(make_model: ModelMaker, tmp_path: Path) -> None:
    """A bfloat16 base and a float32 bad model: neither may be rounded while loading, wherever this runs."""
    base, bad = make_model().to(torch.bfloat16), make_model(seed=1)
    base.save_pretrained(tmp_path / "base")
    bad.save_pretrained(tmp_path / "bad")
    for folder in ("base", "bad"):
        AutoTokenizer.from_pretrained(embedded_model_path()).save_pretrained(tmp_path / folder)
    unlearned = negate(tmp_path / "base", tmp_path / "bad", alpha=0.5)
    weight, bad_weight = base.lm_head.weight.float(), bad.lm_head.weight
    expected = (weight - 0.5 * (bad_weight - weight)).to(torch.bfloat16)
    assert unlearned.dtype == torch.bfloat16
    assert torch.equal(unlearned.lm_head.weight, expected)


def test_a_base_that_is_written_for_a_while_outlives_the_making_of_the_result(
    make_model: ModelMaker, tmp_path: Path
) -> None:
    """As of a GGUF file: the folder beside the result isn't taken for one that a killed call left."""
    base = make_model()
    bad = disturbed(base)
    bad.save_pretrained(tmp_path / "bad")
    out = tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    loaded = LoadedModel(model=base, tokenizer=tokenizer, name="base", revision=None)
    with base_as_files(loaded, out) as written:
        wanted = FolderNegation(base=written, bad=tmp_path / "bad", out=out, alpha=1.0, resumable=False)
        wanted.run(wanted.plan())
    assert_same_bits(AutoModelForCausalLM.from_pretrained(out).state_dict(), negate(base, bad).state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "out"]
