"""How far a run has come, read from its folder alone, as somebody would who finds it after a crash."""

from __future__ import annotations

import json
from pathlib import Path

PHASES = (
    "data", "base evaluation", "stage 1", "stage 2", "sweep", "wipe", "result evaluation", "report", "complete",
)  # fmt: skip
"""In their order; a run with a given alpha has no sweep, and one that keeps its bad model no wipe."""


def phase_of(run: Path, *, keeps_bad: bool = False) -> str:
    """The phase in which a run is, or was when it died.

    Args:
        run: Its folder, which need not exist.
        keeps_bad: The bad model stays, so that its folder says nothing.
    """
    evaluation = run / "evaluation"
    if (run / "unlearned").exists():
        if (run / "bad").exists() and not keeps_bad:
            return "wipe"
        if not (evaluation / "unlearned" / "evaluation.json").exists():
            return "result evaluation"
        return "complete" if _is_complete(run) else "report"
    if (run / "sweep").exists() and not (run / "sweep" / "frontier.svg").exists():
        return "sweep"
    if (run / "bad" / "final").exists():
        return "stage 2"
    if (run / "bad").exists() or (evaluation / "base" / "evaluation.json").exists():
        return "stage 1"
    return "base evaluation" if evaluation.exists() else "data"


def _is_complete(run: Path) -> bool:
    return bool(json.loads((run / "manifest.json").read_text(encoding="utf-8"))["status"] == "complete")
