"""How often the gate errs: false alarms on people's and models' real texts, hits on texts that are no language.

Each set is NAME=FILE:PROMPT_COLUMN:REPLY_COLUMN of a CSV file. The surface rules read every row; the word-salad rule
needs the base model, so it reads a seeded sample. With --prefill-tokens N the first N tokens of each text are
taken for a prefill and the rest for the reply. Prints tables of counts, never a word of any text.

    python scripts/gate_figures.py MODEL_DIR --gguf-file NAME \
        --set "TruthfulQA best answers=TruthfulQA.csv:Question:Best Answer" \
        --set "PKU replies=pku_saferlhf_mini.csv:prompt:response" --sample 300
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sku.config import ModelConfig
from sku.evaluate.gate import is_word_salad, surface_faults
from sku.evaluate.generation.prompts import PromptEncoder
from sku.evaluate.metrics import Rate, rate
from sku.evaluate.perplexity import score_fluency
from sku.evaluate.records import GenerationRecord
from sku.models import LoadedModel, load_model

MAX_CHARACTERS = 400
"""Longer texts are cut here for the word-salad rule, about where an evaluation cuts replies."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A prompt with a reply."""

    prompt: str
    reply: str
    start: str = ""
    """What the reply was made to begin with."""


def read_set(description: str) -> tuple[str, list[Pair]]:
    """``NAME=FILE:PROMPT:REPLY`` as the name and its pairs; rows without a reply are left out."""
    name, _, place = description.partition("=")
    file, prompt, reply = place.rsplit(":", 2)
    with Path(file).open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    return name, [Pair(prompt=row[prompt], reply=row[reply]) for row in rows if row[reply] and row[reply].strip()]


def broken_texts(pairs: Sequence[Pair], seed: int) -> dict[str, list[Pair]]:
    """What a broken model might say to the same prompts."""
    rng = random.Random(seed)
    vocabulary = sorted({word for pair in pairs for word in pair.reply.split()})

    def letters(_pair: Pair) -> str:
        return " ".join("".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 9))) for _ in range(24))

    def shuffled(pair: Pair) -> str:
        words = pair.reply[:MAX_CHARACTERS].split()
        return " ".join(rng.sample(words, len(words)))

    makers: dict[str, Callable[[Pair], str]] = {
        "nothing": lambda _pair: "",
        "random letters": letters,
        "one word, 60 times": lambda pair: f"{pair.reply.split()[0]} " * 60,
        "six words, over and over": lambda pair: f"{' '.join(pair.reply.split()[:6])} " * 15,
        "symbols": lambda _pair: "".join(rng.choices("!?#*-_=.,;", k=80)),
        "the prompt again": lambda pair: pair.prompt,
        "words of the whole set, drawn": lambda _pair: " ".join(rng.choices(vocabulary, k=40)),
        "a real reply, its words shuffled": shuffled,
    }
    return {name: [dataclasses.replace(pair, reply=make(pair)) for pair in pairs] for name, make in makers.items()}


def parted(pairs: Sequence[Pair], encoder: PromptEncoder, tokens: int) -> list[Pair]:
    """The first tokens of each reply as its prefill; replies that are no longer are left out."""
    found = []
    for pair in pairs:
        prefilled = encoder.prefill(pair.prompt, pair.reply, tokens)
        if prefilled is not None and pair.reply.startswith(prefilled[1].lstrip()):
            start = prefilled[1].lstrip()
            found.append(Pair(prompt=pair.prompt, start=start, reply=pair.reply[len(start) :]))
    return found


def word_salads(loaded: LoadedModel, pairs: Sequence[Pair], seed: int) -> list[bool]:
    """The word-salad rule on the pairs that are long enough for it."""
    encoder = PromptEncoder.of(loaded.model, loaded.tokenizer, "auto")
    records = [
        GenerationRecord(
            id=str(number), split="forget_test", kind="prefill" if pair.start else "reply", category=None,
            prompt=pair.prompt, reference="", prefill=pair.start, reply=pair.reply[:MAX_CHARACTERS], num_tokens=1,
            finished=True,
        )
        for number, pair in enumerate(pairs)
    ]  # fmt: skip
    return [
        is_word_salad(score.nll, score.shuffled_nlls)
        for score in score_fluency(loaded.model.eval(), records, encoder.scored_reply, seed=seed, batch_size=16)
    ]


def faulty(pairs: Sequence[Pair]) -> list[bool]:
    """The surface rules on whole texts."""
    return [bool(surface_faults(pair.reply, prompt=pair.prompt)) for pair in pairs]


def cell(found: Rate | None) -> str:
    """A rate as a table shows it."""
    if found is None:
        return "none"
    return f"{found.count} of {found.total} ({100 * found.low:.1f} to {100 * found.high:.1f} %)"


def main() -> None:
    """Reads the options, measures, prints two Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the base model")
    parser.add_argument("--gguf-file")
    parser.add_argument("--set", dest="sets", action="append", required=True, metavar="NAME=FILE:PROMPT:REPLY")
    parser.add_argument("--sample", type=int, default=300, help="texts of each set that the base model reads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prefill-tokens", type=int, default=0, help="tokens of each text that are a prefill")
    options = parser.parse_args()
    loaded = load_model(ModelConfig(path=options.model, gguf_file=options.gguf_file, dtype="float32", device="cpu"))
    everything: list[Pair] = []
    print("| real texts | surface rules | word salad, by the base model |\n|---|---:|---:|")
    for description in options.sets:
        name, pairs = read_set(description)
        if options.prefill_tokens:
            pairs = parted(pairs, PromptEncoder.of(loaded.model, loaded.tokenizer, "auto"), options.prefill_tokens)
        drawn = random.Random(options.seed).sample(pairs, min(options.sample, len(pairs)))
        everything += drawn
        print(f"| {name} | {cell(rate(faulty(pairs)))} | {cell(rate(word_salads(loaded, drawn, options.seed)))} |")
    chosen = random.Random(options.seed).sample(everything, min(options.sample, len(everything)))
    print("\n| broken texts | surface rules | word salad, of those that the surface rules miss |\n|---|---:|---:|")
    for name, pairs in broken_texts(chosen, options.seed).items():
        caught = faulty(pairs)
        missed = [pair for pair, hit in zip(pairs, caught, strict=True) if not hit]
        print(f"| {name} | {cell(rate(caught))} | {cell(rate(word_salads(loaded, missed, options.seed)))} |")


if __name__ == "__main__":
    main()
