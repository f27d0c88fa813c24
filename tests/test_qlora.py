"""QLoRA end to end: four-bit base in training, full-precision base in negation. bitsandbytes has a CPU path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from sku.config import ModelConfig, load_recipe
from sku.errors import ModelError, TaskVectorError
from sku.models import check_plain_weights, load_model
from sku.negate.task_vector import TaskVector
from sku.pipeline.run import run_recipe


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
    recipe = load_recipe(
        "embedded",
        [
            f"model.path={wide_model}", "acquire.tuning=qlora", "acquire.training.max_steps=2",
            "evaluate.prompts=2", "evaluate.retain_prompts=2", "evaluate.max_new_tokens=4",
            "evaluate.attacks=[]", "negate.alpha=1.0", "evaluate.samples=0",
            "data.forget.limit=120", "data.retain.limit=120",
        ],
    )  # fmt: skip
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
    with pytest.raises(ModelError, match="is quantized"):
        check_plain_weights(model, "base")
    with pytest.raises(TaskVectorError, match="quantized"):
        TaskVector.between(model, model)
