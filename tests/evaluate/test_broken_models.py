"""Models land where they belong: the base, and its copy with broken weights, which babbles.

On the embedded world, and on SmolLM2-135M-Instruct with PKU-SafeRLHF prompts where both are there. Replies of the
latter are never shown: counts alone are compared.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from sku.config import EvaluateConfig, ModelConfig
from sku.data.examples import ForgetRetainData
from sku.data.load import load_forget_retain
from sku.evaluate.run import evaluate
from sku.models import LoadedModel, load_model

WORLD = EvaluateConfig(prompts=12, retain_prompts=12, max_new_tokens=40, samples=0)
SMOL = EvaluateConfig(prompts=6, retain_prompts=6, max_new_tokens=24, samples=0, prefill_tokens=())
MODELS = Path(os.environ.get("SKU_TEST_MODELS", Path(__file__).resolve().parents[2] / "models"))
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def with_noise(model: PreTrainedModel, share: float) -> PreTrainedModel:
    """A copy whose weights are overlaid with noise, a share of their own spread: it computes, and babbles."""
    broken = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in broken.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise * parameter.std() * share)
    return broken


@pytest.fixture(scope="module")
def world() -> tuple[LoadedModel, ForgetRetainData]:
    return load_model("embedded"), load_forget_retain()


@pytest.mark.integration
def test_broken_weights_babble_in_the_embedded_world(world: tuple[LoadedModel, ForgetRetainData]) -> None:
    loaded, data = world
    broken = with_noise(loaded.model, 2.0)
    result = evaluate(broken, loaded.tokenizer, data, config=WORLD, base_model=loaded.model)
    assert result.replies["forget_test"]["gibberish"].value == 1
    assert result.replies["forget_test"]["harmful"].value == 0
    base = evaluate(loaded.model, loaded.tokenizer, data, config=WORLD, base_model=loaded.model)
    assert base.replies["forget_test"]["harmful"].value >= 0.9
    assert base.replies["forget_test"]["gibberish"].value == 0


@pytest.fixture(scope="module")
def smollm2(shared_data: Path) -> tuple[LoadedModel, ForgetRetainData]:
    folder = MODELS / "smollm2-135m-instruct"
    if not (folder / GGUF).is_file():
        pytest.skip(f"{folder / GGUF} is not there: scripts/fetch-models.sh brings it")
    loaded = load_model(ModelConfig(path=str(folder), gguf_file=GGUF, dtype="float32", device="cpu"))
    data = load_forget_retain(str(shared_data / "pku_saferlhf_mini.csv"), str(shared_data / "TruthfulQA.csv"))
    return loaded, data


@pytest.mark.integration
@pytest.mark.shared
def test_smollm2_and_its_broken_copy(smollm2: tuple[LoadedModel, ForgetRetainData]) -> None:
    loaded, data = smollm2
    base = evaluate(loaded.model, loaded.tokenizer, data, config=SMOL, base_model=loaded.model)
    assert base.replies["forget_test"]["gibberish"].count <= 1
    assert base.replies["forget_test"]["harmful"].value >= 0.5
    assert base.replies["retain_test"]["gibberish"].count <= 1
    broken = with_noise(loaded.model, 0.7)
    result = evaluate(broken, loaded.tokenizer, data, config=SMOL, base_model=loaded.model)
    assert result.replies["forget_test"]["gibberish"].value >= 0.9
    assert result.replies["retain_test"]["gibberish"].value >= 0.9
