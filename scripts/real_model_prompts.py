"""Draws the prompts of the measured real models from ../shared/data, always the same ones.

    .venv/bin/python scripts/real_model_prompts.py ../shared/data src/sku/prompts/borderline.csv prompts

Written are ``harmful.jsonl``, ``normal.jsonl`` and ``borderline.jsonl``, of which ``sku data own`` makes the training
rows, and what no model is trained on: ``unseen.jsonl``, 300 harmful prompts of the same sources, ``other.jsonl``,
those of HarmBench that no other source holds, and ``normal_unseen.jsonl``. XSTest's prompts are neither.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

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
    unseen = trained_on.sample(UNSEEN, random_state=7)
    other = harmful[harmful["source"] == OTHER_SOURCE].drop_duplicates("prompt").sample(frac=1, random_state=2)
    other = other[~other["prompt"].isin(trained_on["prompt"])]
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
