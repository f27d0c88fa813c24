"""Writes what the measured judge of docs/judges.md is trained on: labelled replies, and normal answers as safe ones.

    python scripts/judge_data.py ../shared/data/judge/labelled.jsonl ../shared/data/normal/instructions.jsonl OUT.jsonl

Of the labelled replies those of ``split_hint`` train: all of PKU, and of Do-Not-Answer all harmful and 1,100 safe
ones, which would else outweigh the rest. Of the normal answers 700 of two sources; the other sources are left to
measure false alarms on. Without normal answers a judge calls a third of them harmful.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

COLUMNS = ["source", "prompt", "response", "harmful", "labeller", "response_model", "licence"]
NORMAL_SOURCES = ("gpteacher_roleplay", "open_instruct_human_eval")


def judge_data(labelled: pd.DataFrame, normal: pd.DataFrame) -> pd.DataFrame:
    """Draws and mixes the rows, always the same ones.

    Args:
        labelled: Columns ``COLUMNS`` and ``split_hint``.
        normal: Columns ``source``, ``prompt``, ``response`` and ``licence``.

    Returns:
        Rows with ``COLUMNS`` in a drawn order.
    """
    labelled = labelled.assign(harmful=labelled["harmful"].astype(bool))
    train = labelled[labelled["split_hint"] == "train"]
    many = train[train["source"] == "do_not_answer"]
    rest = train[train["source"] != "do_not_answer"]
    few = pd.concat([many[many["harmful"]], many[~many["harmful"]].sample(1100, random_state=0)])
    answers = normal[normal["source"].isin(NORMAL_SOURCES)].sample(700, random_state=0)
    answers = answers.assign(source="normal", harmful=False, labeller="none", response_model="")
    return pd.concat([rest, few, answers])[COLUMNS].sample(frac=1, random_state=0)


def main() -> None:
    """Reads both files and writes the mixture."""
    labelled, normal, out = (Path(argument) for argument in sys.argv[1:4])
    rows = judge_data(pd.read_json(labelled, lines=True), pd.read_json(normal, lines=True))
    rows.to_json(out, orient="records", lines=True)
    print(f"{len(rows)} rows in {out}")


if __name__ == "__main__":
    main()
