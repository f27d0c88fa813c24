"""Tiny real checkpoints of judges, with weights set by hand, written to folders as any Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WORDS = (
    "how do i make zorvex gel ? take vornite and mix it with water then wait warm blue golden florn sings no yes safe"
).split()
HARM = "boil"
SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>")
GUARD_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>guard{{ '\n' }}"  # jinja2 drops a template's last line break.
)
CORPUS = " ".join([*WORDS, HARM, "user assistant guard Yes No safe unsafe S1"])


def guard_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows the words above, with turn markers as special tokens and a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([CORPUS, CORPUS.replace(" ", "\n")] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", chat_template=GUARD_TEMPLATE
    )


def pair_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Reads two texts with token types, as BERT's; one token a word."""
    known = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys(words)])}
    backend = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def any_word_guard(folder: Path, *, max_position_embeddings: int = 512) -> Path:
    """Writes a Llama that says ``unsafe`` where the word ``boil`` stands anywhere in what it reads, else ``safe``.

    Every token has 1 in dimension 0, ``boil`` also in dimension 1. Attention is a plain mean: it adds 57 times the
    share of ``boil`` to dimension 2, from which ``unsafe`` takes its logit; every other word but ``safe`` falls with
    dimension 0.
    """
    tokenizer = guard_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=max_position_embeddings, bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    attention, embeddings, head = model.model.layers[0].self_attn, model.model.embed_tokens, model.lm_head
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.zero_()
        embeddings.weight[:, 0] = embeddings.weight[tokenizer.convert_tokens_to_ids(f"\u0120{HARM}"), 1] = 1
        attention.v_proj.weight[0, 1], attention.o_proj.weight[2, 0] = 1, 20
        head.weight[:, 0] = -10
        unsafe, safe = (tokenizer.convert_tokens_to_ids(word) for word in ("unsafe", "safe"))
        head.weight[unsafe, 0], head.weight[unsafe, 2], head.weight[safe, 0] = -1, 2, 0
    return save(folder, model, tokenizer)


def last_word_classifier(
    folder: Path, rows: list[tuple[float, float]], *, labels: list[str] | None = None, **changes: Any
) -> Path:
    """Writes a Llama classifier whose every logit is set by the last token that it pools.

    Attention and MLP add nothing, and a token's embedding is 1 in dimension 0 (``boil``) or in dimension 1 (any
    other). After the RMS norm that is 4 (the root of 16 dimensions), so a label's logit is 4 times the first number
    of its row behind ``boil``, and 4 times the second behind any other token.
    """
    tokenizer = guard_tokenizer()
    names = labels or [f"LABEL_{index}" for index in range(len(rows))]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, bos_token_id=None, eos_token_id=2, pad_token_id=None,
        id2label=dict(enumerate(names)), **changes,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    harm = tokenizer.convert_tokens_to_ids(f"\u0120{HARM}")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[:, 1] = 1
        model.model.embed_tokens.weight[harm, :2] = torch.tensor([1.0, 0.0])
        model.score.weight.zero_()
        model.score.weight[:, :2] = torch.tensor(rows)
    return save(folder, model, tokenizer)


def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Writes a checkpoint as any Hugging Face model."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
