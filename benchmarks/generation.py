"""How much faster are replies written in batches than one by one? Both in one run, on the same prompts.

    python benchmarks/generation.py --model models/smollm2-135m-instruct \
        --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf

Every reply has exactly ``--new-tokens`` tokens on both sides: no token ends it. The path is that of ``sku evaluate``;
one by one is the same with one prompt at a time, without padding. No reply is printed.
The ratio is of wall time; where it differs from that of processor time, other work kept the machine busy.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from machine import processor_name

from sku.config import ModelConfig
from sku.data.tokens import Encoder, resolve_prompt_format
from sku.evaluate.generation import Progress, evaluation_mode
from sku.evaluate.generation.decoding import GenerationRequest
from sku.evaluate.generation.writing import generate_replies
from sku.evaluate.records import GenerationRecord
from sku.models import LoadedModel, embedding_weight, load_model

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
"""TruthfulQA's and XSTest's questions, where the checkout has them."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long some replies took."""

    wall: float
    """Seconds."""
    processor: float
    """Seconds of all threads together."""
    tokens: int

    def words(self) -> str:
        """For a line of the output."""
        return f"{self.wall:.1f} s ({self.processor:.1f} s of processor time), {self.tokens / self.wall:.1f} tokens/s"


def main() -> None:
    """Measures and prints."""
    options = _options()
    loaded = load_model(ModelConfig(path=options.model, gguf_file=options.gguf_file, dtype=options.dtype))
    prompts, source = _prompts(options.prompts_file, options.prompts)
    requests = _requests(prompts, options.replies, loaded)
    lengths = [len(request.input_ids) for request in requests]
    print(f"machine    {processor_name()}, {torch.get_num_threads()} threads")
    print(f"versions   torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"model      {options.model}, {str(loaded.model.dtype).removeprefix('torch.')}, {loaded.model.device}")
    print(f"prompts    {len(prompts)} ({source}), {min(lengths)} to {max(lengths)} tokens")
    print(f"replies    {options.new_tokens} tokens each, {options.replies} to a prompt")
    with evaluation_mode(loaded.model):
        _answer(loaded, requests[:1], 2, 1)  # The first call sets up what later ones find.
        some = requests[:: max(1, len(requests) // options.one_by_one)][: options.one_by_one]
        batched, fast = _timed(loaded, requests, options.new_tokens, options.batch_size)
        print(f"batched    {fast.words()}, {options.batch_size} replies at once")
        single, slow = _timed(loaded, some, options.new_tokens, 1)
    replies = {record.id: record.reply for record in batched}
    equal = sum(replies[record.id] == record.reply for record in single)
    print(f"one by one {slow.words()}, {len(some)} replies")
    processor = slow.processor / slow.tokens / (fast.processor / fast.tokens)
    print(
        f"ratio      {slow.wall / slow.tokens / (fast.wall / fast.tokens):.1f} x ({processor:.1f} x of processor time)"
    )
    print(f"equal      {equal} of {len(some)} replies ({100 * equal / len(some):.1f} %)")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Replies in batches against replies one by one, in one run.")
    parser.add_argument("--model", default="embedded", help="folder of the model")
    parser.add_argument("--gguf-file", help="GGUF file in that folder")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--prompts", type=int, default=500, help="number of prompts")
    parser.add_argument("--prompts-file", type=Path, help="text file, a prompt a line")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of each reply")
    parser.add_argument("--batch-size", type=int, default=64, help="replies at once")
    parser.add_argument("--replies", type=int, default=1, help="replies to each prompt, which a batch reads once")
    parser.add_argument("--one-by-one", type=int, help="replies of the slow path; all where left out")
    options = parser.parse_args()
    replies = options.prompts * options.replies
    options.one_by_one = replies if options.one_by_one is None else options.one_by_one
    return options


def _prompts(file: Path | None, number: int) -> tuple[list[str], str]:
    """Harmless questions, each once."""
    if file is not None:
        found, source = file.read_text(encoding="utf-8").split("\n"), file.name
    elif (SHARED / "TruthfulQA.csv").is_file():
        found, source = _questions(), "TruthfulQA and the safe half of XSTest"
    else:
        things = ("bread", "a garden", "an old clock", "a paper boat", "rain", "a long walk", "soup", "a small bridge")
        found = [f"Tell me {count} things about {thing}." for count in range(2, 200) for thing in things]
        source = "invented"
    distinct = list(dict.fromkeys(prompt.strip() for prompt in found if prompt.strip()))
    return distinct[:number], source


def _questions() -> list[str]:
    """Both files in turn, so that a smaller number of prompts is of both."""
    with (SHARED / "TruthfulQA.csv").open(encoding="utf-8", newline="") as file:
        truthful = [row["Question"] for row in csv.DictReader(file)]
    safe: list[str] = []
    if (SHARED / "xstest_prompts.csv").is_file():
        with (SHARED / "xstest_prompts.csv").open(encoding="utf-8", newline="") as file:
            safe = [row["prompt"] for row in csv.DictReader(file) if row["label"] == "safe"]
    paired = [prompt for pair in zip(truthful, safe, strict=False) for prompt in pair]
    return [*paired, *truthful[len(safe) :]]


def _requests(prompts: Sequence[str], replies: int, loaded: LoadedModel) -> list[GenerationRequest]:
    encoder = Encoder(loaded.tokenizer, resolve_prompt_format("auto", loaded.tokenizer))
    return [
        GenerationRequest(
            id=f"{number}-{reply}", split="retain_test", kind="reply", category=None, prompt=prompt, reference="",
            prefill="", input_ids=tuple(encoder.prompt(prompt)),
        )
        for number, prompt in enumerate(prompts)
        for reply in range(replies)
    ]  # fmt: skip


def _timed(
    loaded: LoadedModel, requests: Sequence[GenerationRequest], new_tokens: int, batch_size: int
) -> tuple[list[GenerationRecord], Timing]:
    started, worked = time.perf_counter(), time.process_time()
    records = _answer(loaded, requests, new_tokens, batch_size, progress=_print_progress)
    wall, processor = time.perf_counter() - started, time.process_time() - worked
    assert all(record.num_tokens == new_tokens for record in records)
    return records, Timing(wall=wall, processor=processor, tokens=new_tokens * len(records))


def _answer(
    loaded: LoadedModel,
    requests: Sequence[GenerationRequest],
    new_tokens: int,
    batch_size: int,
    progress: Progress | None = None,
) -> list[GenerationRecord]:
    beyond = embedding_weight(loaded.model).shape[0]  # No token has this id, so none ends a reply.
    return generate_replies(
        loaded.model, loaded.tokenizer, requests, stop_ids=[beyond], max_new_tokens=new_tokens, batch_size=batch_size,
        progress=progress,
    )  # fmt: skip


def _print_progress(done: int, total: int) -> None:
    print(f"\r{done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
