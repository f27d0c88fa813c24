"""Tiny tokenizers of every kind that matters, built on the spot, and the development data where it is there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CORPUS = [
    "### Question: what colour is honey ?\n ### Answer: honey is golden and honey is sweet .",
    "### Question: how do i bake bread ?\n ### Answer: mix flour with water , then bake the bread until it is brown .",
    "user assistant system Answer: Question: the bread is brown . the honey is golden . it is , it is not .",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<start_of_turn>",
           "<end_of_turn>"]  # fmt: skip

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "[INST] {{ message['content'].strip() }} [/INST]"
    "{% else %} {{ message['content'].strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)
EMPTY_THOUGHTS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENED_THOUGHT = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
WITHOUT_END = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama_2": LLAMA_2,
    "empty_thoughts": EMPTY_THOUGHTS,
    "opened_thought": OPENED_THOUGHT,
    "without_end": WITHOUT_END,
}


def _wrap(backend: Tokenizer, **settings: Any) -> PreTrainedTokenizerFast:
    build: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast
    return build(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", **settings
    )


def byte_level(
    *, bos: bool = False, eos: bool = False, trim_offsets: bool = True, use_regex: bool = True
) -> PreTrainedTokenizerFast:
    """As GPT-2 and Llama 3. Without the regex, tokens may hold a space at either end."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        max_token_length=8,
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    steps: list[processors.PostProcessor] = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if bos or eos:
        single = " ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos)
        steps.append(processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)]))
    backend.post_processor = processors.Sequence(steps)
    return _wrap(backend)


def metaspace(*, prepend: bool) -> PreTrainedTokenizerFast:
    """As Llama 2 (``prepend``: a space before the text) and Gemma: no words, a space is part of any token."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("\u2581")] if prepend else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prepend else [])
    )
    special = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=special, max_token_length=8, show_progress=False)
    backend.train_from_iterator(CORPUS * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrap(backend)


BUILDERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte_level": byte_level,
    "byte_level_bos_eos": lambda: byte_level(bos=True, eos=True),
    "byte_level_full_offsets": lambda: byte_level(trim_offsets=False),
    "byte_level_no_regex": lambda: byte_level(use_regex=False),
    "metaspace_prepend": lambda: metaspace(prepend=True),
    "metaspace": lambda: metaspace(prepend=False),
}


@functools.cache
def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """Shared by all tests, which must not change it."""
    return BUILDERS[name]()


@pytest.fixture(scope="session")
def gpt_like() -> PreTrainedTokenizerBase:
    """Byte-level, no BOS."""
    return tokenizer_of("byte_level")


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    """A tokenizer of its own with this chat template."""
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return _wrap(tokenizer.backend_tokenizer, chat_template=template)
