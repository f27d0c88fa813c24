"""A run in progress as one page that reloads itself: loss terms, what stage 1 has learned, replies written, time left.

A file and not a server or a tracker: it needs no port and no account, it is there on a cluster where only the disk is
shared, and it reads what the run writes for its own sake, so that looking on costs the run nothing.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sku.errors import EvaluationError
from sku.evaluate.record_files import GENERATIONS_FILE, read_json_object
from sku.progress import duration
from sku.report.figures import PALETTE
from sku.report.read_run import MANIFEST_FILE
from sku.storage import STEPS_FILE, write_private_text

LIVE_FILE = "live.html"
RELOAD = 5
"""Seconds after which the page is read anew."""
_WIDTH, _HEIGHT = 640, 160
_COLOURS = ("harm", "unlearned", "second", "third", "fourth")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One loss term."""

    name: str
    colour: str
    last: float
    points: str
    """Of an SVG polyline, ``_WIDTH`` by ``_HEIGHT``."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """One model in training, or trained."""

    name: str
    step: int
    of: int
    left: str
    """Time left, in words; empty where it can't be told yet, or it is done."""
    lines: tuple[Line, ...]


@dataclass(frozen=True, kw_only=True)
class Live:
    """What a run's folder says of a run in progress."""

    title: str
    recipe: str
    finished: bool
    stages: tuple[tuple[str, str], ...]
    """Stage that is done -> how long it took."""
    trainings: tuple[Training, ...]
    learned: str
    """What stage 1 has learned, asked on validation prompts; empty before it is asked."""
    replies: tuple[tuple[str, int], ...]
    """Model -> replies that are written."""


def read_live(folder: Path) -> Live:
    """Reads a run in progress.

    Args:
        folder: Of ``sku run``.

    Returns:
        How far it has come.

    Raises:
        EvaluationError: It is no folder of a run, or its manifest is broken.
    """
    if not (folder / MANIFEST_FILE).is_file():
        raise EvaluationError(f"{folder} is no run folder: it has no {MANIFEST_FILE} (yet)")
    manifest = read_json_object(folder / MANIFEST_FILE, "run again into a new folder")
    recipe = manifest.get("recipe", {})
    return Live(
        title=folder.resolve().name,
        recipe=f"recipe {recipe.get('name')}, method {recipe.get('method')}, seed {recipe.get('seed')}",
        finished=manifest.get("status") == "complete",
        stages=tuple((name, duration(seconds)) for name, seconds in manifest.get("seconds", {}).items()),
        trainings=tuple(_trainings(folder)),
        learned=str(manifest.get("stage_1", {}).get("line", "")),
        replies=tuple(_replies(folder)),
    )


def write_live(folder: Path) -> Live:
    """Writes ``LIVE_FILE`` into the folder, readable by its owner alone.

    Raises:
        EvaluationError: As ``read_live``.
        OutputError: The file can't be written.
    """
    found = read_live(folder)
    environment = Environment(
        loader=PackageLoader("sku.report"), undefined=StrictUndefined, autoescape=True, trim_blocks=True
    )
    page = environment.get_template("live.html.jinja").render(
        live=found, reload=RELOAD, width=_WIDTH, height=_HEIGHT, now=time.strftime("%H:%M:%S"),
        colours={name: PALETTE[name] for name in _COLOURS},
    )  # fmt: skip
    write_private_text(folder / LIVE_FILE, page)
    return found


def _trainings(folder: Path) -> list[Training]:
    found = []
    for path in sorted(folder.glob(f"**/{STEPS_FILE}")):
        rows = {row["step"]: row for row in map(_row, path.read_text(encoding="utf-8").splitlines()) if row}
        logged = [rows[step] for step in sorted(rows)]
        if logged:
            found.append(_training(path.parent.name, logged))
    return found


def _row(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:  # The last line may be half written.
        return {}
    return row if isinstance(row, dict) and {"step", "of", "time"} <= row.keys() else {}


def _training(name: str, logged: list[dict[str, Any]]) -> Training:
    first, last = logged[0], logged[-1]
    step, of = int(last["step"]), int(last["of"])
    pace = (last["time"] - first["time"]) / max(step - int(first["step"]), 1)
    terms = [key for key in last if key == "loss" or key.startswith("loss/")]
    highest = max((abs(row[key]) for row in logged for key in terms if key in row), default=0.0) or 1.0
    lines = []
    for place, key in enumerate(terms):
        points = [
            f"{_WIDTH * row['step'] / of:.1f},{_HEIGHT * (0.5 - 0.5 * row[key] / highest):.1f}"
            for row in logged
            if key in row
        ]
        colour = _COLOURS[place % len(_COLOURS)]
        lines.append(Line(name=key.removeprefix("loss/"), colour=colour, last=last[key], points=" ".join(points)))
    left = duration(pace * (of - step)) if len(logged) > 1 and step < of else ""
    return Training(name=name, step=step, of=of, left=left, lines=tuple(lines))


def _replies(folder: Path) -> list[tuple[str, int]]:
    found: dict[str, int] = {}
    for name in (GENERATIONS_FILE, f".{GENERATIONS_FILE}.partial"):
        for path in sorted((folder / "evaluation").glob(f"*/{name}")):
            with path.open("rb") as file:
                found[path.parent.name] = max(found.get(path.parent.name, 0), sum(1 for _ in file) - 1)
    return sorted(found.items())
