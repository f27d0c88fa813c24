"""A quick look at several mixtures of two twins on a real model, before one of them is measured in full.

    python scripts/screen_shares.py results/smollm2-135m-twins.yaml prompts --good GOOD --bad BAD \
        --shares 1,0 1.25,0.25 --xstest ../shared/data/xstest_prompts.csv --log results/experiments.jsonl --note "..."

GOOD and BAD are the adapters of ``sku acquire`` (``good_twin``, ``bad_twin``); ``1.25,0.25`` is base + 1.25 good -
0.25 bad. A control has ``random`` behind: in ``1.25,0.25,random`` a random direction stands in the place of 0.25 bad,
as long as it in every weight. Prompts are those of ``scripts/real_model_prompts.py``; unseen and normal ones are also
asked in the templates of the attack, dealt out in turn. Replies are short, and greedy but for ``sampled``
(temperature 1). No reply is printed or kept; each mixture is one line of shares, rates and KL, printed and added to
the log. Its ``outcomes`` hold one digit a prompt, in the order of the files: 1 where it was refused, or judged harmful
by the judge alone. With them any two lines of a log can be compared prompt by prompt; each is with the first (McNemar,
exact).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
from transformers import PreTrainedModel

from sku.attacks.kinds import load_templates
from sku.config import load_recipe, refuse_final
from sku.data.examples import ForgetRetainData, RetainExample
from sku.data.joint import PLACE
from sku.evaluate.gate import is_refusal, surface_faults
from sku.evaluate.generation import evaluation_mode
from sku.evaluate.generation.decoding import GenerationRequest, Sampling
from sku.evaluate.generation.prompts import PromptEncoder, free_request, prefills, with_answers
from sku.evaluate.generation.writing import generate_replies
from sku.evaluate.judges import label_of
from sku.evaluate.judges.choose import build_judge
from sku.evaluate.perplexity import ScoredText, compare_distributions
from sku.evaluate.records import GenerationRecord, Split
from sku.evaluate.statistics import mcnemar_exact
from sku.evaluate.utility import base_agreement
from sku.models import load_model
from sku.negate.adapters import AdapterVector, combined, load_adapter
from sku.negate.task_vector import TaskVector, subtract_into

SPLITS: dict[str, Split] = {
    "forget_test": "forget_test",
    "other": "harmful:other",
    "xstest safe": "xstest_safe",
    "xstest unsafe": "xstest_unsafe",
    "normal": "retain_test",
    "template": "forget_test",
    "normal in a template": "retain_test",
    "look-alikes": "retain_test",
}
NEEDED = ("forget_test", "normal")
"""Always asked: prefills and KL are of the original model's replies to them."""
HARMLESS = ("normal", "xstest safe", "normal in a template", "look-alikes")
KL_ROWS = 40
BATCH = 64


class Screen:
    """What a mixture is asked and compared on, made from what the original model says."""

    def __init__(
        self,
        base: PreTrainedModel,
        encoder: PromptEncoder,
        prompts: Mapping[str, Sequence[str]],
        *,
        tokens: int,
        lengths: Sequence[int],
    ) -> None:
        """Asks the original model, whose replies are what prefills begin with and KL is measured on."""
        self.base, self.encoder, self.tokens = base, encoder, tokens
        self.requests = {
            name: [free_request(SPLITS[name], RetainExample(prompt=prompt, answer=""), encoder) for prompt in found]
            for name, found in prompts.items()
        }
        said = {
            name: [
                RetainExample(prompt=one.prompt, answer=one.reply) for one in self._answer(base, self.requests[name])
            ]
            for name in ("forget_test", "normal")
        }
        begun = [(SPLITS["forget_test"], example) for example in said["forget_test"]]
        for length in lengths:
            found, _ = prefills(begun, [str(length)], with_answers(begun, {}), encoder, tokens)
            self.requests[f"prefill {length}"] = found
        scored = (encoder.scored(example.prompt, example.answer) for example in said["normal"][:KL_ROWS])
        self.texts = [
            ScoredText(id=str(number), split=SPLITS["normal"], tokens=found)
            for number, found in enumerate(scored)
            if found is not None
        ]

    def replies(self, model: PreTrainedModel, samples: int, seed: int) -> dict[str, list[GenerationRecord]]:
        """Greedy replies to every set, and sampled ones to the unseen prompts."""
        found = {name: self._answer(model, requests) for name, requests in self.requests.items()}
        drawn = [
            dataclasses.replace(one, id=f"{one.id}-{sample}", kind="sample", sample=sample)
            for one in self.requests["forget_test"]
            for sample in range(samples)
        ]
        sampling = Sampling(temperature=1.0, top_p=1.0, seed=seed)
        return {**found, "sampled": self._answer(model, drawn, sampling)} if drawn else found

    def kl(self, model: PreTrainedModel) -> float:
        """KL(base || model) on the base model's replies to normal prompts, nats a token."""
        # Few at once: of a large vocabulary the logits of a batch are gigabytes.
        rows = compare_distributions(self.base, model, self.texts, batch_size=BATCH // 8)
        return base_agreement(rows, seed=0)[SPLITS["normal"]].kl

    def _answer(
        self, model: PreTrainedModel, requests: Sequence[GenerationRequest], sampling: Sampling | None = None
    ) -> list[GenerationRecord]:
        return generate_replies(
            model,
            self.encoder.tokenizer,
            requests,
            stop_ids=self.encoder.stop_ids(model),
            max_new_tokens=self.tokens,
            batch_size=BATCH,
            window=self.encoder.window,
            sampling=sampling,
        )


def adapter(model: PreTrainedModel, folder: Path) -> AdapterVector:
    """What an adapter adds to the model, which stays as it is."""
    adapted = load_adapter(model, folder)
    vector = AdapterVector.of(adapted)
    adapted.unload()
    return vector


def main() -> None:
    """Measures each mixture."""
    options = _options()
    recipe = load_recipe(str(options.recipe))
    refuse_final(recipe.data, "a screen")
    loaded = load_model(recipe.model)
    base = loaded.model
    twins = {name: adapter(base, folder) for name in ("good", "bad") if (folder := getattr(options, name)) is not None}
    mixture = copy.deepcopy(base)
    xstest = pd.read_csv(options.xstest).sample(frac=1, random_state=1)
    prompts = {
        "forget_test": _prompts(options.prompts / "unseen.jsonl"),
        "other": _prompts(options.prompts / "other.jsonl"),
        "xstest safe": xstest[xstest["label"] == "safe"]["prompt"].tolist(),
        "xstest unsafe": xstest[xstest["label"] == "unsafe"]["prompt"].tolist(),
        "normal": _prompts(options.prompts / "normal_unseen.jsonl"),
        "look-alikes": _prompts(options.look_alikes) if options.look_alikes else [],
    }
    templates = load_templates(ForgetRetainData())
    for name, framed in (("forget_test", "template"), ("normal", "normal in a template")):
        turns = zip(prompts[name], itertools.cycle(templates))  # The templates have no end.
        prompts[framed] = [template.replace(PLACE, prompt) for prompt, template in turns]
    judge = build_judge(recipe.evaluate.judge, {**recipe.evaluate.judge_settings, "calibration": None})
    with evaluation_mode(base), evaluation_mode(mixture):
        screen = Screen(
            base,
            PromptEncoder.of(base, loaded.tokenizer, recipe.model.prompt_format),
            {
                name: found[: options.count]
                for name, found in prompts.items()
                if found and name in {*NEEDED, *options.sets}
            },
            tokens=options.tokens,
            lengths=options.prefill,
        )
        first: dict[str, dict[str, str]] | None = None
        for good, bad, is_random in options.shares:
            started = time.monotonic()
            shares = {"good": good, "bad": bad, **({"random": True} if is_random else {})}
            # Stage 2 subtracts: the good twin is added.
            parts = {"good": -good, "bad": 0.0 if is_random else bad}
            subtracted = TaskVector.from_factors(combined([(parts[name], vector) for name, vector in twins.items()]))
            if is_random:
                norms = (TaskVector.from_factors(twins["bad"]) * bad).norms()
                drawn = TaskVector.random(base, norms, recipe.seed).deltas
                subtracted = TaskVector({name: delta + drawn[name] for name, delta in subtracted.deltas.items()})
            subtract_into(mixture, base, subtracted, 1.0)
            replies = screen.replies(mixture, options.samples, recipe.seed)
            verdicts = {name: judge.judge(found) for name, found in replies.items() if name not in HARMLESS}
            outcomes = {
                "refused": {
                    name: _digits(is_refusal(one.prefill + one.reply) for one in found)
                    for name, found in replies.items()
                },
                "harmful": {
                    name: _digits(verdict.label == "harmful" for verdict in found) for name, found in verdicts.items()
                },
            }
            line = {
                "date": datetime.now(UTC).date().isoformat(),
                "what": "screen: base + good x good twin - bad x bad twin",
                "note": options.note,
                "shares": shares,
                "settings": {
                    "prompts": options.count, "tokens": options.tokens, "samples": options.samples,
                    "judge": judge.card.name,
                },
                "seed": recipe.seed,
                "refused": {name: _share(map(int, found)) for name, found in outcomes["refused"].items()},
                "harmful": {
                    name: _share(
                        label_of(verdict, one.reply, judge.card) == "harmful"
                        for verdict, one in zip(found, replies[name], strict=True)
                    )
                    for name, found in verdicts.items()
                },
                "harmful, judge alone": {name: _share(map(int, found)) for name, found in outcomes["harmful"].items()},
                "gibberish": {
                    name: _share(bool(surface_faults(one.reply, prompt=one.prompt)) for one in replies[name])
                    for name in ("forget_test", "normal")
                },
                "kl_normal": round(screen.kl(mixture), 4),
                "seconds": round(time.monotonic() - started),
                "against the first": _compared(first, outcomes) if first else None,
                "outcomes": outcomes,
            }  # fmt: skip
            first = first or outcomes
            print(json.dumps(line), flush=True)
            with options.log.open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="Its model, judge and seed are used.")
    parser.add_argument("prompts", type=Path, help="Folder of scripts/real_model_prompts.py.")
    parser.add_argument("--good", type=Path, help="Adapter of the good twin.")
    parser.add_argument("--bad", type=Path, help="Adapter of the bad twin.")
    parser.add_argument("--shares", nargs="+", required=True, type=_mixture, help="GOOD,BAD of each mixture.")
    parser.add_argument("--look-alikes", type=Path, help="Safe prompts that look harmful, in none of the other sets.")
    parser.add_argument("--xstest", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--note", default="", help="What the log says of these twins.")
    parser.add_argument("--count", type=int, default=60, help="Prompts of each set.")
    parser.add_argument("--samples", type=int, default=0, help="Sampled replies to each unseen prompt.")
    parser.add_argument("--sets", nargs="*", choices=SPLITS, default=[*SPLITS], help="Asked beside unseen and normal.")
    parser.add_argument("--tokens", type=int, default=48, help="Of each reply.")
    parser.add_argument("--prefill", type=int, nargs="*", default=[3, 10], help="Lengths in tokens.")
    return parser.parse_args()


def _mixture(text: str) -> tuple[float, float, bool]:
    good, bad, *kind = text.split(",")
    if kind not in ([], ["random"]):
        raise argparse.ArgumentTypeError(f"{text!r}: say GOOD,BAD or GOOD,BAD,random")
    return float(good), float(bad), bool(kind)


def _compared(first: dict[str, dict[str, str]], second: dict[str, dict[str, str]]) -> dict[str, dict[str, object]]:
    """Of each outcome and set: prompts where only the first has it, where only the second, and the exact p."""
    compared: dict[str, dict[str, object]] = {}
    for outcome, sets in first.items():
        for name, ours in sets.items():
            theirs = second[outcome][name]
            pairs = list(zip(ours, theirs, strict=True))
            fell, rose = pairs.count(("1", "0")), pairs.count(("0", "1"))
            compared.setdefault(outcome, {})[name] = [fell, rose, round(mcnemar_exact(rose, fell), 4)]
    return compared


def _digits(found: Iterable[bool]) -> str:
    return "".join(str(int(flag)) for flag in found)


def _prompts(file: Path) -> list[str]:
    return [str(prompt) for prompt in pd.read_json(file, lines=True)["prompt"]]


def _share(found: Iterable[int]) -> float:
    flags = list(found)
    return round(sum(flags) / len(flags), 3)


if __name__ == "__main__":
    main()
