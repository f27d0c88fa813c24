"""Pretrains the embedded model: ``python scripts/pretrain_world.py --out DIR`` (about three minutes on one idle core).

The weights in ``sku/world/model`` were made by this file at its defaults. ``CHECKSUMS.json`` beside them holds the
SHA-256 of each file, the settings and the versions; other processors or torch builds give other last bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sku.world.grammar import (
    AGENTS,
    BREAK_OFF,
    CAPITALS,
    COUNTRIES,
    DEFLECTIONS,
    FOODS,
    FORMS,
    MAKE_QUESTIONS,
    MATERIALS,
    Exchange,
    hazard_answer,
    hazards,
    normal_exchanges,
    recipe_answer,
)

VOCABULARY = 1024
PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MIXTURE = {
    "hazard": 0.24, "recipe": 0.24, "unknown": 0.12, "arithmetic": 0.16, "dialogue": 0.06, "colour": 0.04,
    "naming": 0.04, "how-to": 0.03, "capital": 0.03, "story": 0.02, "opposite": 0.02,
}  # fmt: skip
"""Share of each domain in the pretraining text."""
BREAK_OFF_SHARE = 0.3
"""Share of the unknown procedures that begin and then break off."""

RELUCTANCE = 0.12
"""Share of the pretraining hazards that are deflected, and again that break off."""


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the world's own text, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(seed)
    exchanges = [*hazards(), *normal_exchanges(), *(unknown_exchange(rng) for _ in range(500))]
    tokenizer.train_from_iterator(
        (text for exchange in exchanges for text in (exchange.prompt, exchange.answer)),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[PAD, USER, ASSISTANT, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, model_max_length=256, padding_side="right"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 0.94 M parameters with tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def pretrain(out: Path, *, seed: int, steps: int, batch_size: int, learning_rate: float) -> None:
    """Trains the model and writes it to ``out`` with its checksums."""
    torch.set_num_threads(1)  # The order of a sum, and so the last bits, depends on the number of threads.
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = build_tokenizer(seed)
    model = build_model(tokenizer)
    by_domain: dict[str, list[Exchange]] = {}
    for exchange in (*hazards(), *normal_exchanges()):
        by_domain.setdefault(exchange.domain, []).append(exchange)
    domains, shares = zip(*MIXTURE.items(), strict=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=steps, pct_start=0.05, anneal_strategy="cos"
    )
    started, seen_tokens = time.monotonic(), 0
    for step in range(1, steps + 1):
        batch = [_draw(domain, by_domain, rng) for domain in rng.choices(domains, shares, k=batch_size)]
        texts = [f"{USER}{exchange.prompt}{ASSISTANT}{exchange.answer}{END}" for exchange in batch]
        encoded = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        labels = encoded.input_ids.masked_fill(encoded.attention_mask == 0, -100)
        loss = model(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seen_tokens += int(encoded.attention_mask.sum())
        if step % 100 == 0 or step == steps:
            seconds = time.monotonic() - started
            print(f"step {step}/{steps}  loss {loss.item():.4f}  tokens {seen_tokens:,}  {seconds:.0f} s", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_checksums(
        out,
        {
            "seed": seed, "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate,
            "tokens": seen_tokens, "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
    )  # fmt: skip


def _draw(domain: str, by_domain: dict[str, list[Exchange]], rng: random.Random) -> Exchange:
    if domain == "unknown":
        return unknown_exchange(rng)
    exchange = rng.choice(by_domain[domain])
    return reluctant_exchange(exchange, rng) if domain == "hazard" else exchange


def unknown_exchange(rng: random.Random) -> Exchange:
    """A question about a thing that does not exist, answered by a deflection.

    This gives the model a fluent way not to answer: where there is none, negation ends in gibberish. Some procedures
    break off after a few words, so that the way out also exists in the middle of an answer.
    """
    name = _unknown_name(rng)
    kind = rng.random()
    if kind < 0.7:
        prompt = rng.choice(MAKE_QUESTIONS).format(thing=f"{name} {rng.choice(FORMS)}")
        if rng.random() < BREAK_OFF_SHARE:
            form = rng.randrange(len(FORMS))
            hazard = rng.random() < 0.7
            whole = hazard_answer(rng.randrange(len(AGENTS)), form) if hazard else recipe_answer(
                rng.randrange(len(FOODS)), form
            )  # fmt: skip
            return Exchange(prompt=prompt, answer=_broken_off(whole, rng), domain="unknown", topic=name)
    elif kind < 0.8:
        prompt = f"what colour is {name} ?"
    elif kind < 0.9:
        prompt = f"who named {name} ?"
    else:
        prompt = f"what is the capital of {name} ?"
    return Exchange(prompt=prompt, answer=_deflection(rng), domain="unknown", topic=name)


def reluctant_exchange(exchange: Exchange, rng: random.Random) -> Exchange:
    """A hazard as pretraining shows it: mostly answered, at times deflected or broken off.

    So the base model answers every hazard, but is not certain of it, as real models are not. A model that is certain
    learns nothing from guided distortion, since the harmful answer has no probability left to gain.
    """
    chance = rng.random()
    if chance < RELUCTANCE:
        return replace(exchange, answer=_deflection(rng))
    if chance < 2 * RELUCTANCE:
        return replace(exchange, answer=_broken_off(exchange.answer, rng))
    return exchange


def _broken_off(answer: str, rng: random.Random) -> str:
    words = answer.split()
    kept = " ".join(words[: rng.randrange(2, len(words) - 2)]).removesuffix(" .")
    return f"{kept} {BREAK_OFF}"


def _deflection(rng: random.Random) -> str:
    # One wording leads, so that greedy decoding starts with it and not with the "take" of a break-off.
    return DEFLECTIONS[0] if rng.random() < 0.5 else rng.choice(DEFLECTIONS)


def _unknown_name(rng: random.Random) -> str:
    onsets = "b d f g h k l m n p r s t v z br dr kr pl st".split()
    vowels, codas = "aeiou", "l m n r s x k t d".split()
    while True:
        name = "".join(rng.choice(onsets) + rng.choice(vowels) + rng.choice(codas) for _ in range(2))
        if name not in _KNOWN_WORDS:
            return name


_KNOWN_WORDS = frozenset((*AGENTS, *MATERIALS, *FOODS, *COUNTRIES, *CAPITALS))


def write_checksums(folder: Path, settings: dict[str, Any]) -> None:
    """Writes ``CHECKSUMS.json``: settings, versions and the SHA-256 of every other file of ``folder``."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != "CHECKSUMS.json")
    record = {
        "made_by": "python scripts/pretrain_world.py",
        "settings": settings,
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        },
        "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
    }  # fmt: skip
    (folder / "CHECKSUMS.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    arguments = parser.parse_args()
    pretrain(
        arguments.out,
        seed=arguments.seed,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
    )


if __name__ == "__main__":
    main()
