"""Small invented records and a tiny random model with a character tokenizer. No network, no harmful text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from sku.data.examples import ForgetExample, ForgetRetainData, Provenance, RetainExample
from sku.data.load import load_forget_retain
from sku.evaluate.records import GenerationRecord
from sku.models import load_model

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
def tiny_data() -> ForgetRetainData:
    """Invented pairs for the random model; one answer is too short for a prefill."""
    return ForgetRetainData(
        forget_train=tuple(ForgetExample(prompt=f"do thing {n}", answer=f"first take {n}") for n in range(4)),
        forget_test=(ForgetExample(prompt="do another", answer="no"),),
        retain_train=(),
        retain_validation=(),
        retain_test=tuple(RetainExample(prompt=f"say {n}", answer=f"{n} it is", category="say") for n in range(3)),
        provenance=(Provenance(source="test", location="test"),),
    )


class World(NamedTuple):
    """The embedded world: its own model, which answers everything, and its data."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: ForgetRetainData


@pytest.fixture(scope="module")
def world() -> World:
    loaded = load_model("embedded")
    return World(loaded.model, loaded.tokenizer, load_forget_retain())
