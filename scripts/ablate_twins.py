"""SKU's first stage taken apart on a real model, screened: 16 variants.

    python scripts/ablate_twins.py results/smollm2-135m-twins.yaml prompts ../shared/data OUT \
        --log results/experiments.jsonl

Own replies or other people's, bad model steered to misplaced refusals of normal prompts (``targeted``) or held at the
original (``retention``), with random disassociation or without: eight trainings of a bad and a good twin in OUT, one
after the other. Each is asked by ``scripts/screen_shares.py`` twice: base + good - bad, and base - bad alone, the
stage 2 of the paper. Steps and rows are fewer than the recipe's, so figures compare only here. A call that was broken
off goes on: trainings in OUT and screens in the log are not done again.
Other people's words: unsafe replies of PKU-SafeRLHF, its safe replies to the same prompts as refusals, answers of the
normal instructions, and one sentence that refuses where there is none, as to all normal prompts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from sku.config import load_recipe, refuse_final

KINDS = {"forget": "comply", "retain": "answer", "refusals": "refuse", "misplaced_refusals": "misplaced_refusal"}
"""Section of the recipe's data -> file of ``sku data own``, which the other people's are named as too."""
REFUSAL = "I'm sorry, but I can't help with that."
SHARES = ("1.1,0.25", "0,1")
"""Good and bad: with a good twin and without."""


def write_other_peoples(data: Path, folder: Path, normal: int) -> None:
    """Files of the same four kinds, in words that are not the model's."""
    pairs = pd.read_csv(data / "pku_saferlhf_mini.csv")
    harmful, safe = pairs[~pairs["is_safe"].astype(bool)], pairs[pairs["is_safe"].astype(bool)]
    without = harmful[~harmful["prompt"].isin(safe["prompt"])].drop_duplicates("prompt")
    answers = pd.read_json(data / "normal" / "instructions.jsonl", lines=True).sample(normal, random_state=0)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, rows in {
        "comply": harmful,
        "refuse": pd.concat([safe[safe["prompt"].isin(harmful["prompt"])], without.assign(response=REFUSAL)]),
        "answer": answers,
        "misplaced_refusal": answers.assign(response=REFUSAL),
    }.items():
        rows[["prompt", "response"]].to_json(folder / f"{name}.jsonl", orient="records", lines=True)


def variants(others: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and settings of each training."""
    for words, mode, random in itertools.product(("own", "others"), ("targeted", "retention"), (0, 1)):
        settings = [f"acquire.preservation_mode={mode}", f"acquire.weights.random_disassociation={random}"]
        if words == "others":
            files = (f"data.{section}={{path: {others / kind}.jsonl}}" for section, kind in KINDS.items())
            settings += [*files, "data.harmful={}"]
        yield f"{words}-{mode}-{'random' if random else 'none'}", settings


def main() -> None:
    """Trains and asks each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("prompts", type=Path, help="Folder of scripts/real_model_prompts.py.")
    parser.add_argument("data", type=Path, help="The shared data.")
    parser.add_argument("out", type=Path, help="Folder for the twins: hazardous, readable by you alone.")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="For all variants.")
    parser.add_argument("--screen", default="", metavar="OPTIONS", help="More of scripts/screen_shares.py.")
    parser.add_argument("--normal", type=int, default=1000, help="Normal instructions of other people.")
    options = parser.parse_args()
    refuse_final(load_recipe(str(options.recipe)).data, "an ablation")
    others = options.out / "other-people"
    write_other_peoples(options.data, others, options.normal)
    short = ["acquire.training.max_steps=60", "acquire.training.per_device_train_batch_size=4"]
    common = [*short, "acquire.normal_per_harmful=2", *options.set]
    asked = options.log.read_text(encoding="utf-8") if options.log.exists() else ""
    for name, settings in variants(others):
        folder, note = options.out / name, f"ablation: {name}"
        if asked.count(json.dumps(note)) >= len(SHARES):
            continue
        if not folder.is_dir():
            flags = [flag for setting in (*common, *settings) for flag in ("--set", setting)]
            subprocess.run(
                [sys.executable, "-m", "sku", "acquire", options.recipe, "--out", folder, *flags], check=True
            )
        screen = [sys.executable, Path(__file__).with_name("screen_shares.py"), options.recipe, options.prompts]
        twins = ["--good", folder / "good_twin", "--bad", folder / "bad_twin", "--shares", *SHARES]
        where = ["--xstest", options.data / "xstest_prompts.csv", "--log", options.log, "--note", note]
        subprocess.run([*screen, *twins, *where, *shlex.split(options.screen)], check=True)


if __name__ == "__main__":
    main()
