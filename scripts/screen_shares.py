"""A quick look at several mixtures of two twins on a real model, before one of them is measured in full.

    python scripts/screen_shares.py results/smollm2-135m-twins.yaml prompts --good GOOD --bad BAD \
        --shares 1,0 1.25,0.25 --xstest ../shared/data/xstest_prompts.csv --log results/experiments.jsonl --note "..."

GOOD and BAD are the adapters of ``sku acquire`` (``good_twin``, ``bad_twin``); ``1.25,0.25`` is base + 1.25 good -
0.25 bad. Prompts are those of ``scripts/real_model_prompts.py``. Replies are greedy and short. No reply is printed or
kept; each mixture is one line of shares, rates and KL, printed and added to the log.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import torch
from transformers import PreTrainedModel

from sku.config import load_recipe
from sku.data.tokenization import tokenize_prompt, tokenize_start
from sku.evaluate.asking import Writer
from sku.evaluate.batching import evaluation_mode
from sku.evaluate.degeneracy import surface_faults
from sku.evaluate.generation import GenerationRequest, generate_replies, stop_token_ids
from sku.evaluate.judges import build_judge
from sku.evaluate.records import GenerationRecord, Split
from sku.evaluate.refusal import is_refusal
from sku.models import load_model
from sku.negate.adapters import AdapterVector, load_adapter

SPLITS: dict[str, Split] = {
    "unseen": "unseen",
    "other": "harmful:other",
    "xstest safe": "xstest_safe",
    "xstest unsafe": "xstest_unsafe",
    "normal": "retain_test",
}
KL_ROWS = 40


class Screen:
    """The prompts, and what is asked of a model."""

    def __init__(self, model: PreTrainedModel, writer: Writer, prompts: dict[str, list[str]], tokens: int) -> None:
        """Takes the original model, whose replies are what prefills and KL begin from."""
        self.model, self.writer, self.prompts, self.tokens = model, writer, prompts, tokens
        self.stops = stop_token_ids(model, writer.tokenizer, writer.end_of_turn())
        base = {name: self.ask(name) for name in ("unseen", "normal")}
        self.begun = [self._ids(record.reply) for record in base["unseen"]]
        self.rows = [
            (tokenize_prompt(record.prompt, writer.tokenizer, writer.prompt_format), self._ids(record.reply))
            for record in base["normal"][:KL_ROWS]
            if record.reply
        ]
        self.reference = [self._log_probabilities(prompt, reply) for prompt, reply in self.rows]

    def ask(self, name: str, prefill: int = 0) -> list[GenerationRecord]:
        """Greedy replies to one set, after ``prefill`` tokens of the base model's own; each with its start."""
        tokenizer, form = self.writer.tokenizer, self.writer.prompt_format
        requests = []
        for number, prompt in enumerate(self.prompts[name]):
            start = tokenizer.decode(self.begun[number][:prefill]) if prefill else ""
            ids = tokenize_start(prompt, start, tokenizer, form) if start else tokenize_prompt(prompt, tokenizer, form)
            requests.append(
                GenerationRequest(
                    id=f"{name}-{number}", split=SPLITS[name], kind="prefill" if start else "reply", category="",
                    prompt=prompt, reference="", forced_start=start, input_ids=tuple(ids),
                )
            )  # fmt: skip
        found = generate_replies(
            self.model, tokenizer, requests, stop_ids=self.stops, max_new_tokens=self.tokens, batch_size=64,
            window=self.writer.window,
        )  # fmt: skip
        return [
            dataclasses.replace(record, reply=record.forced_start + record.reply, forced_start="", kind="reply")
            for record in found
        ]

    def kl(self) -> float:
        """KL(base || model) on the base model's replies to normal prompts, nats a token."""
        sums, tokens = 0.0, 0
        for (prompt, reply), reference in zip(self.rows, self.reference, strict=True):
            now = self._log_probabilities(prompt, reply)
            sums += float((reference.exp() * (reference - now)).sum())
            tokens += len(reply)
        return sums / tokens

    def _ids(self, reply: str) -> list[int]:
        return list(self.writer.tokenizer(reply, add_special_tokens=False).input_ids)

    def _log_probabilities(self, prompt: Sequence[int], reply: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits = self.model(input_ids=torch.tensor([[*prompt, *reply]], device=self.model.device)).logits
        return logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)


def factors(model: PreTrainedModel, folder: Path | None) -> dict[str, torch.Tensor]:
    """What an adapter adds to each weight; nothing for no adapter."""
    if folder is None:
        return {}
    adapted = load_adapter(model, folder)
    vector = AdapterVector.of(adapted)
    adapted.unload()
    return {name: part.upper_Or @ part.lower_rI for name, part in vector.factors.items()}


@contextlib.contextmanager
def mixed(
    model: PreTrainedModel, parts: Sequence[tuple[float, dict[str, torch.Tensor]]]
) -> Iterator[None]:  # fmt: skip
    """The model with ``sum share x change`` added to its weights, and afterwards without."""
    weights = dict(model.named_parameters())
    names = {name for _, part in parts for name in part}
    before = {name: weights[name].detach().clone() for name in names}
    with torch.no_grad():
        for name in names:
            changes = [share * part[name] for share, part in parts if name in part]
            weights[name].copy_(before[name].float() + torch.stack(changes).sum(0))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                weights[name].copy_(weight)


def main() -> None:
    """Measures each mixture."""
    options = _options()
    recipe = load_recipe(str(options.recipe))
    loaded = load_model(recipe.model)
    writer = Writer.of(loaded.model, loaded.tokenizer, recipe.model.prompt_format)
    xstest = pd.read_csv(options.xstest).sample(frac=1, random_state=1)
    prompts = {
        "unseen": _prompts(options.prompts / "unseen.jsonl"),
        "other": _prompts(options.prompts / "other.jsonl"),
        "xstest safe": xstest[xstest["label"] == "safe"]["prompt"].tolist(),
        "xstest unsafe": xstest[xstest["label"] == "unsafe"]["prompt"].tolist(),
        "normal": _prompts(options.prompts / "normal_unseen.jsonl"),
    }
    judge = build_judge(recipe.evaluate.judge, {**recipe.evaluate.judge_settings, "calibration": None})
    with evaluation_mode(loaded.model):
        few = {name: found[: options.count] for name, found in prompts.items()}
        screen = Screen(loaded.model, writer, few, options.tokens)
        good, bad = (factors(loaded.model, folder) for folder in (options.good, options.bad))
        for good_share, bad_share in options.shares:
            started = time.monotonic()
            with mixed(loaded.model, [(good_share, good), (-bad_share, bad)]):
                replies = {name: screen.ask(name) for name in few}
                replies |= {f"prefill {length}": screen.ask("unseen", length) for length in options.prefill}
                divergence = screen.kl()
            line = {
                "date": datetime.now(UTC).date().isoformat(),
                "what": "screen: base + good x good twin - bad x bad twin",
                "note": options.note,
                "shares": {"good": good_share, "bad": bad_share},
                "settings": {"prompts": options.count, "tokens": options.tokens, "judge": judge.card.name},
                "seed": recipe.seed,
                "refused": {name: _share(is_refusal(one.reply) for one in found) for name, found in replies.items()},
                "harmful": {
                    name: _share(verdict.label == "harmful" for verdict in judge.judge(found))
                    for name, found in replies.items()
                    if name not in ("normal", "xstest safe")
                },
                "gibberish": {
                    name: _share(bool(surface_faults(one.reply, prompt=one.prompt)) for one in replies[name])
                    for name in ("unseen", "normal")
                },
                "kl_normal": round(divergence, 4),
                "seconds": round(time.monotonic() - started),
            }
            print(json.dumps(line), flush=True)
            with options.log.open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="Its model, judge and seed are used.")
    parser.add_argument("prompts", type=Path, help="Folder of scripts/real_model_prompts.py.")
    parser.add_argument("--good", type=Path, help="Adapter of the good twin.")
    parser.add_argument("--bad", type=Path, help="Adapter of the bad twin.")
    parser.add_argument("--shares", nargs="+", required=True, type=_pair, help="GOOD,BAD of each mixture.")
    parser.add_argument("--xstest", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--note", default="", help="What the log says of these twins.")
    parser.add_argument("--count", type=int, default=60, help="Prompts of each set.")
    parser.add_argument("--tokens", type=int, default=48, help="Of each reply.")
    parser.add_argument("--prefill", type=int, nargs="*", default=[3, 10], help="Lengths in tokens.")
    return parser.parse_args()


def _pair(text: str) -> tuple[float, float]:
    good, bad = map(float, text.split(","))
    return good, bad


def _prompts(file: Path) -> list[str]:
    return [str(prompt) for prompt in pd.read_json(file, lines=True)["prompt"]]


def _share(found: Iterator[bool]) -> float:
    flags = list(found)
    return round(sum(flags) / len(flags), 3)


if __name__ == "__main__":
    main()
