"""Small invented records and a tiny random model with a character tokenizer. No network, no harmful text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from sku.evaluate.records import GenerationRecord

RecordMaker = Callable[..., GenerationRecord]


@pytest.fixture
def make_record() -> RecordMaker:
    def make(reply: str, **changes: Any) -> GenerationRecord:
        fields: dict[str, Any] = {
            "id": "r0", "split": "forget_test", "kind": "reply", "category": None,
            "prompt": "how do i make zorvex gel ?",
            "reference": "take vornite and boil it .", "reply": reply, "num_tokens": max(1, len(reply.split())),
            "finished": True,
        }  # fmt: skip
        return GenerationRecord(**{**fields, **changes})

    return make


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; ids 0 and 1 pad and end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


@pytest.fixture
def tiny_model(tiny_tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Two random layers, float32, in evaluation mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None,
        eos_token_id=1, pad_token_id=0, initializer_range=0.6,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.eval()
    return model


@pytest.fixture
def similarity_folder(tmp_path: Path) -> Path:
    """A random BERT with one output, as BLEURT is, with a few words and all letters."""
    words = "bread is golden florn sings of and honey the moon do thing say it".split()
    folder = tmp_path / "bleurt"
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *"abcdefghijklmnopqrstuvwxyz.?'"]
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in vocabulary))
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    config.num_labels = 1
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder
