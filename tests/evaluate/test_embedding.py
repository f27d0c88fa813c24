"""Sentence embeddings: a mean over a text's own tokens, whatever it is batched with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from sku.errors import ModelError
from sku.evaluate.embedding import MAX_TOKENS, load_embedder

TEXTS = ["bread is golden", "", "a florn sings of bread and honey", "the moon", "bread is golden"]
CPU = torch.device("cpu")


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_embeddings_are_the_mean_of_each_text_alone(embedding_folder: Path, batch_size: int) -> None:
    embedder = load_embedder(str(embedding_folder), CPU)
    done: list[tuple[int, int]] = []
    found = embedder.embed(TEXTS, batch_size=batch_size, progress=lambda count, total: done.append((count, total)))
    assert found.shape == (5, 16)
    assert done[-1] == (4, 4), "a text that comes twice is embedded once"
    for text, vector in zip(TEXTS, found, strict=True):
        ids = torch.tensor([embedder.tokenizer(text).input_ids])
        with torch.no_grad():
            states = embedder.model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(vector, functional.normalize(states.mean(0), dim=0), rtol=0, atol=1e-6)
    assert torch.equal(found[0], found[4])


def test_no_texts_have_no_embedding_and_long_ones_are_cut(embedding_folder: Path) -> None:
    embedder = load_embedder(str(embedding_folder), CPU)
    assert embedder.embed([], batch_size=2).shape == (0, 16)
    longest = min(MAX_TOKENS, embedder.model.config.max_position_embeddings)
    inside, beyond = embedder.embed(["bread " * (longest - 2), "bread " * 900], batch_size=1)
    assert torch.equal(inside, beyond)


def test_a_fingerprint_tells_weights_apart(embedding_folder: Path) -> None:
    before = load_embedder(str(embedding_folder), CPU).fingerprint()
    assert load_embedder(str(embedding_folder), CPU).fingerprint() == before
    weights = load_file(embedding_folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"] *= 1.5
    save_file(weights, embedding_folder / "model.safetensors", metadata={"format": "pt"})
    assert load_embedder(str(embedding_folder), CPU).fingerprint() != before


def test_what_can_not_embed_is_refused(embedding_folder: Path, tmp_path: Path) -> None:
    pooling = embedding_folder / "1_Pooling" / "config.json"
    pooling.parent.mkdir()
    pooling.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    with pytest.raises(ModelError, match=r"does not take the mean .*pooling_mode_cls_token"):
        load_embedder(str(embedding_folder), CPU)
    pooling.write_text("{")
    with pytest.raises(ModelError, match="can't be read"):
        load_embedder(str(embedding_folder), CPU)
    pooling.write_text(json.dumps({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 16}))
    load_embedder(str(embedding_folder), CPU)
    weights = load_file(embedding_folder / "model.safetensors")
    del weights["encoder.layer.0.output.dense.bias"]
    save_file(weights, embedding_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights, the first is encoder.layer.0.output.dense.bias"):
        load_embedder(str(embedding_folder), CPU)
    with pytest.raises(ModelError, match="holds no config.json"):
        load_embedder(str(tmp_path / "nowhere"), CPU)
    with pytest.raises(ModelError, match="can't be loaded"):
        load_embedder("invented/embedder", CPU)
