"""Task vectors: exact differences, and nothing left out quietly."""

from __future__ import annotations

import copy
import math
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from torch import nn

from conftest import ModelMaker
from negate.conftest import disturbed, with_adapter
from sku.errors import OutputError, TaskVectorError
from sku.negate.adapters import AdapterVector, check_plain_lora
from sku.negate.matching import bad_form, unique_weights
from sku.negate.task_vector import TaskVector
from sku.storage import BAD_MODEL_MARK


class Pair(nn.Module):
    """Two weights of known values."""

    def __init__(self, first: list[float], second: list[float]) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.tensor(first))
        self.second = nn.Parameter(torch.tensor(second))


BASE, BAD = ([1.0, 2.0], [3.0]), ([4.0, 2.0], [7.0])


def test_between_and_its_norms_by_hand() -> None:
    """(4, 2) - (1, 2) = (3, 0), norm 3; 7 - 3 = 4, norm 4; together sqrt(9 + 16) = 5."""
    vector = TaskVector.between(Pair(*BASE), Pair(*BAD))
    assert {name: delta.tolist() for name, delta in vector.deltas.items()} == {"first": [3.0, 0.0], "second": [4.0]}
    assert vector.norms() == {"first": 3.0, "second": 4.0}
    assert vector.norm() == 5.0
    assert {name: delta.tolist() for name, delta in (-vector).deltas.items()} == {"first": [-3.0, 0.0], "second": [-4]}


def test_saved_privately_and_read_again(tmp_path: Path, make_model: ModelMaker) -> None:
    base = make_model("llama_tied")
    vector = TaskVector.between(base, disturbed(base))
    folder = tmp_path / "vector"
    vector.save(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert (folder / BAD_MODEL_MARK).is_file()
    assert bad_form(folder) == "vector"
    again = TaskVector.load(folder)
    assert again.deltas.keys() == vector.deltas.keys()
    assert all(torch.equal(again.deltas[name], delta) for name, delta in vector.deltas.items())
    assert again.tied == vector.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    with pytest.raises(OutputError, match=str(folder)):
        vector.save(folder)
    (folder / BAD_MODEL_MARK).unlink()
    assert bad_form(folder) == "model", "without the mark"
    (folder / "task_vector.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(TaskVectorError, match="task_vector"):
        TaskVector.load(folder)


def test_two_models_that_do_not_fit(make_model: ModelMaker) -> None:
    base, bad = make_model(), make_model()
    bad.model.layers[1].self_attn.q_proj.register_parameter("weight", None)
    for first, second in ((base, bad), (bad, base)):
        with pytest.raises(TaskVectorError, match=r"layers\.1\.self_attn\.q_proj"):
            TaskVector.between(first, second)
    untied = make_model("llama_tied")
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    for first, second in ((make_model("llama_tied"), base), (untied, make_model("llama_tied"))):
        with pytest.raises(TaskVectorError, match=r"lm_head\.weight"):
            TaskVector.between(first, second)


def test_quantized_weights_in_buffers_are_not_left_out_quietly() -> None:
    """GPTQ and AWQ hold their weights in integer buffers."""

    def packed(value: int) -> nn.Module:
        model = nn.Module()
        model.register_buffer("qweight", torch.full((2, 2), value, dtype=torch.int32))
        model.register_parameter("scale", nn.Parameter(torch.ones(2) * value))
        return model

    with pytest.raises(TaskVectorError, match="qweight"):
        TaskVector.between(packed(1), packed(2))
    eight_bit = nn.Module()
    eight_bit.register_parameter("weight", nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False))
    with pytest.raises(TaskVectorError, match="weight"):
        unique_weights(eight_bit)
    with pytest.raises(TaskVectorError, match="second"):
        TaskVector.between(Pair(*BASE), Pair([4.0, 2.0], [math.nan]))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_adapters_vector_is_that_of_the_merged_model(architecture: str, make_model: ModelMaker) -> None:
    """GPT-2 holds its weights transposed (Conv1D, fan_in_fan_out)."""
    base = make_model(architecture)
    settings: dict[str, Any] = {"fan_in_fan_out": True} if architecture == "gpt2" else {}
    bad = with_adapter(base, **settings)
    vector = TaskVector.from_factors(AdapterVector.of(bad))
    merged: Any = copy.deepcopy(bad).merge_and_unload()
    dense = TaskVector.between(base, merged)
    changed = {name for name, norm in dense.norms().items() if norm > 0}
    assert changed == set(vector.deltas)
    assert len(changed) >= 8
    for name in changed:
        torch.testing.assert_close(vector.deltas[name], dense.deltas[name], rtol=1e-4, atol=1e-6, msg=name)


def test_adapters_that_scaling_b_would_not_negate_are_refused(make_model: ModelMaker) -> None:
    base = make_model("opt", tie_word_embeddings=False)
    on_q: dict[str, Any] = {"target_modules": ["q_proj"]}
    merged = with_adapter(base)
    merged.merge_adapter()
    others: tuple[Any, ...] = (
        *(with_adapter(base, **settings) for settings in (
            {"modules_to_save": ["lm_head"]}, {"bias": "all", **on_q}, {"lora_bias": True, **on_q},
            {"use_dora": True, **on_q}, {"alora_invocation_tokens": [5, 6], **on_q},
            {"init_lora_weights": "pissa", **on_q},
        )),
        *(get_peft_model(copy.deepcopy(base), config) for config in (
            LoHaConfig(r=2, init_weights=False, **on_q), IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
            LoraConfig(**on_q),  # It has learned nothing.
        )),
        merged,
    )  # fmt: skip
    for adapted in others:
        with pytest.raises(TaskVectorError):
            AdapterVector.of(adapted)
    variants = {"init_lora_weights": "loftq", "kasa_config": {"beta": 1e-4}, "use_qalora": True}
    for field, value in {**variants, "layer_replication": [[0, 1], [0, 1]]}.items():
        settings = LoraConfig(**on_q)
        check_plain_lora(settings, "default")
        setattr(settings, field, value)  # Afterwards: making such adapters needs data or packages.
        with pytest.raises(TaskVectorError, match=field):
            check_plain_lora(settings, "default")


def test_half_precision_adapters_are_multiplied_in_float32(make_model: ModelMaker) -> None:
    """``scaling * B A`` with ``scaling = alpha / r = 6 / 4``. The factors stay as they were."""
    bad: Any = with_adapter(make_model()).to(torch.bfloat16)
    layer: Any = bad.get_base_model().model.layers[0].mlp.up_proj
    exact = 1.5 * layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
    delta = TaskVector.from_factors(AdapterVector.of(bad)).deltas["model.layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(delta, exact.detach(), rtol=1e-6, atol=1e-7)
    assert layer.lora_B["default"].weight.dtype == torch.bfloat16
