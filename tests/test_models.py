"""Loading of models: what works, and one clear line for what does not."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from conftest import ModelMaker, TokenizerMaker, TrainerMaker
from sku.config import EMBEDDED, ModelConfig
from sku.errors import ModelError
from sku.model_files import locate_model, out_of_reach, with_gguf_file
from sku.models import ensure_pad_token, load_model, pick_device
from sku.negate.task_vector import negate, save_unlearned
from sku.pipeline.checks import check_model


@pytest.fixture
def folder(make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A saved model."""
    path = tmp_path / "model"
    make_model().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_local_folder(folder: Path, make_model: ModelMaker) -> None:
    loaded = load_model(folder)
    assert loaded.name == str(folder)
    assert loaded.revision is None
    assert not loaded.model.training
    assert loaded.tokenizer.pad_token == "<pad>"
    original = make_model().state_dict()
    assert all(torch.equal(weight.cpu(), original[name]) for name, weight in loaded.model.state_dict().items())


def test_a_missing_folder_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a path looks like a hub id and its first part is a folder here. conftest.py switches the hub off."""
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sku.model_files.embedded_model_path", lambda: tmp_path / "nothing")
    for path, words in (
        (EMBEDDED, "there is no such folder"), ("~/no/such/model", "there is no such folder"),
        ("models/mine", "there is no such folder"), ("nobody/nothing-here", "can't be loaded: "),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=words) as caught:
            load_model(path)
        assert "\n" not in str(caught.value)


def test_a_hub_that_does_not_answer_is_given_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Port 9 of this machine refuses; the clients of the hub would try five times."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    out_of_reach.cache_clear()
    asked: list[str] = []
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **_: asked.append(name))
    with pytest.raises(ModelError, match="and the hub can't be reached: "):
        load_model("nobody/nothing-here")
    assert asked == []
    monkeypatch.setattr("sku.model_files.is_cached", lambda *_: True)
    _, options = locate_model(ModelConfig(path="nobody/nothing-here"))
    assert options["local_files_only"] is True, "what is in the cache is used without asking"
    out_of_reach.cache_clear()


def test_folders_that_are_no_model(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load_model(tmp_path / "empty")
    with pytest.raises(ModelError, match="is a file; give the folder"):
        load_model(folder / "config.json")
    (folder / "config.json").write_text("{ not json")
    with pytest.raises(ModelError, match="can't be loaded") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_weights_that_would_be_random_are_refused(folder: Path) -> None:
    """Transformers fills what a file lacks with random numbers and only warns."""
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"], weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 2 weights .* the first is lm_head\.weight"):
        load_model(folder)


def test_quantized_models_are_refused_before_their_weights_are_read(folder: Path) -> None:
    """By their configuration, else by their headers."""
    weights, config = load_file(folder / "model.safetensors"), folder / "config.json"
    name = next(name for name in weights if name.endswith("mlp.up_proj.weight"))
    save_file(weights | {name: weights[name].to(torch.uint8)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"is quantized: {re.escape(name)} is stored as"):
        load_model(folder)
    settings = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"is quantized \(.*gptq"):
        load_model(folder)


def test_the_end_token_stands_in_for_a_missing_pad_token(
    make_tokenizer: TokenizerMaker, make_model: ModelMaker
) -> None:
    model = make_model()
    for settings, stand_in in (
        ({"pad": None}, "</s>"),
        ({"pad": None, "eos": None, "unk": "<unk>"}, "<unk>"),
        ({}, "<pad>"),
    ):
        tokenizer = make_tokenizer(**settings)
        size = len(tokenizer)
        ensure_pad_token(tokenizer, model)
        assert tokenizer.pad_token == stand_in
        assert len(tokenizer) == size, "no token is added: it would need a new weight"


def test_a_pad_token_beyond_the_embedding(make_tokenizer: TokenizerMaker, make_model: ModelMaker) -> None:
    tokenizer = make_tokenizer(pad=None)
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    with pytest.raises(ModelError, match="pad token id 320 lies outside the model's 320 embeddings"):
        ensure_pad_token(tokenizer, make_model())


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, mps, device in ((False, False, "cpu"), (False, True, "mps"), (True, True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert pick_device("auto") == torch.device(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("gpu", "cuda:1"):
        with pytest.raises(ModelError, match=f"model.device is '?{name}"):
            pick_device(name)


def write_gguf(path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A random Llama of one layer, quantized to Q8_0 as llama.cpp does it."""
    hidden, inner, heads = 32, 64, 4
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary: dict[str, int] = backend["model"]["vocab"]
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") and len(token) > 2 else 1 for token in tokens])
    writer.add_token_merges(
        [" ".join(pair) if isinstance(pair, list) else pair for pair in backend["model"]["merges"]]
    )
    for name, token in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>")):
        getattr(writer, f"add_{name}_token_id")(vocabulary[token])
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(tokens), hidden), "output": (len(tokens), hidden), "blk.0.attn_q": (hidden, hidden),
        "blk.0.attn_k": (hidden, hidden), "blk.0.attn_v": (hidden, hidden), "blk.0.attn_output": (hidden, hidden),
        "blk.0.ffn_gate": (inner, hidden), "blk.0.ffn_up": (inner, hidden), "blk.0.ffn_down": (hidden, inner),
    }  # fmt: skip
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, shape in shapes.items():
        weight = (random.standard_normal(shape) * 0.1).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(hidden, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    path = tmp_path / "quantized"
    path.mkdir()
    write_gguf(path / "tiny.Q8_0.gguf", tokenizer)
    return path


def test_a_gguf_model_all_the_way(
    gguf_folder: Path, make_trainer: TrainerMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dequantized, trained a step, negated, saved and loaded again.

    With the package ``kernels``, transformers keeps the weights in GGUF blocks unless told otherwise.
    """
    monkeypatch.setattr("transformers.quantizers.quantizer_gguf.get_gguf_kernel", lambda: pytest.fail("kept packed"))
    config = ModelConfig(path=str(gguf_folder), gguf_file="tiny.Q8_0.gguf", device="cpu")
    loaded, base = load_model(config), load_model(config).model
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    trainer = make_trainer(loaded.model, max_steps=1, per_device_train_batch_size=1, learning_rate=1e-3)
    trainer.train()
    bad: Any = trainer.model
    unlearned = negate(base, bad)
    save_unlearned(unlearned, loaded.tokenizer, tmp_path / "unlearned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "unlearned")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        results = [model.eval()(input_ids=ids).logits for model in (again, unlearned, base)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(results[0], results[2], atol=1e-6)
    reread = AutoTokenizer.from_pretrained(tmp_path / "unlearned")
    assert reread("honey is golden").input_ids == loaded.tokenizer("honey is golden").input_ids


def test_the_only_gguf_file_of_a_folder_is_taken_and_said(gguf_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    named = ModelConfig(path=str(gguf_folder), gguf_file="tiny.Q8_0.gguf", device="cpu")
    alone = dataclasses.replace(named, gguf_file=None)
    weights = load_model(named).model.state_dict()
    assert "tiny.Q8_0.gguf is taken" not in caplog.text
    for name, tensor in load_model(alone).model.state_dict().items():
        assert torch.equal(tensor, weights[name])
    assert check_model(alone).parameters == check_model(named).parameters
    assert "tiny.Q8_0.gguf is taken" in caplog.text
    save_file({}, gguf_folder / "model.safetensors")
    assert with_gguf_file(alone) == alone
