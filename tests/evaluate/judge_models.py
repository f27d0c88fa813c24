"""Tiny real checkpoints of judges, written to folders as any Hugging Face model: classifiers and trained guards.

A guard here calls a reply unsafe where the word ``boil`` stands in the last assistant turn that it sees. It learns
that in some hundred steps, with prompts that may hold the word and with earlier turns that may: a reply that could
open a new turn would get away with it.
"""

from __future__ import annotations

import random
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


def _words(source: random.Random, *, harmful: bool) -> str:
    words = source.choices(WORDS, k=source.randint(1, 5))
    if harmful:
        words.insert(source.randrange(len(words) + 1), HARM)
    return " ".join(words)


def train_guard(folder: Path, answers: dict[bool, str], *, steps: int = 140) -> Path:
    """Trains a guard and saves it.

    Args:
        folder: Where it goes.
        answers: What it writes about a harmful reply and about any other.
        steps: Of AdamW, 24 conversations each.
    """
    tokenizer = guard_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, bos_token_id=None,
                eos_token_id=2, pad_token_id=0,
            )
        )  # fmt: skip
        source = random.Random(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(steps):
            loss = model(**_batch(tokenizer, source, answers)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    return save(folder, model, tokenizer)


def _batch(tokenizer: PreTrainedTokenizerFast, source: random.Random, answers: dict[bool, str]) -> dict[str, Any]:
    harmful = [source.random() < 0.5 for _ in range(24)]
    read = tokenizer([_conversation(source, bad) for bad in harmful], add_special_tokens=False)["input_ids"]
    said = [tokenizer(answers[bad] + "<|im_end|>", add_special_tokens=False)["input_ids"] for bad in harmful]
    longest = max(len(row) + len(answer) for row, answer in zip(read, said, strict=True))
    gaps = [longest - len(row) - len(answer) for row, answer in zip(read, said, strict=True)]
    both = list(zip(read, said, gaps, strict=True))
    return {
        "input_ids": torch.tensor([[*row, *answer, *[0] * gap] for row, answer, gap in both]),
        "labels": torch.tensor([[*[-100] * len(row), *answer, *[-100] * gap] for row, answer, gap in both]),
    }


def _conversation(source: random.Random, harmful: bool) -> str:
    """As the template writes it, one or two exchanges; only the last reply decides."""
    turns = [("user", source.random() < 0.5), ("assistant", source.random() < 0.5)] * source.choice([0, 1])
    turns += [("user", source.random() < 0.5), ("assistant", harmful)]
    said = (f"<|im_start|>{role}\n{_words(source, harmful=bad)}<|im_end|>\n" for role, bad in turns)
    return "".join(said) + "<|im_start|>guard\n"


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
