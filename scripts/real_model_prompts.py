"""Draws the prompts of the measured real models from ../shared/data, always the same ones.

    .venv/bin/python scripts/real_model_prompts.py ../shared/data src/sku/prompts/borderline.csv prompts

Written are ``harmful.jsonl``, ``normal.jsonl`` and ``borderline.jsonl``, of which ``sku data own`` makes the training
rows, and what no model is trained on, for screens and choices: ``unseen.jsonl``, up to 300 harmful prompts of the same
sources in whole families of near copies, ``other.jsonl``, those of HarmBench that are no near copy of any of these,
and ``normal_unseen.jsonl``. The prompts of ``final/`` are in none of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from sku.data.examples import normalise_prompt
from sku.data.splits import families, near_to

OTHER_SOURCE = "harmbench"
UNSEEN, NORMAL, NORMAL_UNSEEN = 300, 1000, 300
LONGEST = 600
"""Characters of a normal prompt."""


def real_model_prompts(data: Path, borderline: Path) -> dict[str, pd.DataFrame]:
    """Draws all sets.

    Args:
        data: Folder of the shared data.
        borderline: Table with a column ``prompt``.

    Returns:
        Name of the file -> its rows, each harmful prompt in one file only.
    """
    harmful = pd.read_json(data / "prompts" / "harmful.jsonl", lines=True)
    trained_on = harmful[harmful["source"] != OTHER_SOURCE].drop_duplicates("prompt")
    words = trained_on["prompt"].map(normalise_prompt)
    different = tuple(sorted(set(words)))
    family = words.map(dict(zip(different, families(different), strict=True)))
    # Whole families, in a drawn order, until there are enough: no near copy of an unseen prompt is trained on.
    order = family.drop_duplicates().sample(frac=1, random_state=7)
    sizes = family.value_counts().loc[order]
    unseen = trained_on[family.isin(order[(sizes.cumsum() <= UNSEEN).to_numpy()])]
    other = harmful[harmful["source"] == OTHER_SOURCE].drop_duplicates("prompt").sample(frac=1, random_state=2)
    other = other[[not near for near in near_to(tuple(other["prompt"].map(normalise_prompt)), different)]]
    normal = pd.read_json(data / "normal" / "instructions.jsonl", lines=True).drop_duplicates("prompt")
    normal = normal[normal["prompt"].str.len() < LONGEST].sample(NORMAL + NORMAL_UNSEEN, random_state=5)
    alike = pd.read_json(data / "prompts" / "benign_lookalikes.jsonl", lines=True)
    near = pd.concat([pd.read_csv(borderline)["prompt"], alike["prompt"]]).drop_duplicates()
    return {
        "harmful": trained_on.drop(unseen.index)[["prompt", "source", "category"]],
        "unseen": unseen[["prompt", "source", "category"]],
        "other": other[["prompt", "source", "category"]],
        "normal": normal[:NORMAL][["prompt", "source"]],
        "normal_unseen": normal[NORMAL:][["prompt", "source"]],
        "borderline": pd.DataFrame({"prompt": near, "source": "borderline"}),
    }


def main() -> None:
    """Writes the files."""
    data, borderline, out = (Path(argument) for argument in sys.argv[1:4])
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in real_model_prompts(data, borderline).items():
        rows.to_json(out / f"{name}.jsonl", orient="records", lines=True)
        print(f"{len(rows)} prompts in {out / name}.jsonl")


if __name__ == "__main__":
    main()
