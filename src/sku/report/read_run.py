"""A run's folder: what lies where in it, read once and checked. All that is shown of a run comes from here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import UndefinedError

from sku.attacks import AttackReport
from sku.config.recipe import NEGATING_METHODS
from sku.errors import EvaluationError
from sku.evaluate.comparison import Comparison
from sku.evaluate.metrics import ReplyOutcome
from sku.evaluate.records import (
    GENERATIONS_FILE,
    OUTCOMES_FILE,
    GenerationRecord,
    check_schema,
    from_plain,
    is_normal,
    read_generations,
    read_json_object,
    read_rows,
)
from sku.report.words import NOTHING, TableRow
from sku.storage import is_marked_hazardous
from sku.sweep import Sweep

Part = Literal["model", "adapter"]
"""What of a run can be shared."""
MANIFEST_FILE, RESULTS_FILE, LOG_FILE = "manifest.json", "results.json", "training_log.jsonl"
_SHARED: Mapping[Part, tuple[str, ...]] = {"model": ("unlearned",), "adapter": ("negated_adapter", "adapter")}
_SHOWN_OUTCOMES = ("refusal", "safe_answer", "evasive")
"""Outcomes of replies to harmful prompts that are shown as they are; all others are blurred."""
_AGAIN, _SWEEP_AGAIN = "run again into a new folder", "run sku sweep again"
DATA_COLUMNS = ("set", "format", "location", "revision", "SHA-256", "rows read", "licence")


@dataclass(frozen=True, kw_only=True)
class Side:
    """One model's reply and what it came to."""

    record: GenerationRecord
    outcome: ReplyOutcome

    @property
    def hidden(self) -> bool:
        """Whether a reader must ask before it is shown."""
        if is_normal(self.record.split):
            return False
        return self.outcome.judged_harmful or self.outcome.outcome not in _SHOWN_OUTCOMES


@dataclass(frozen=True, kw_only=True)
class ReplyPair:
    """The replies of both models to one prompt, asked in the same way."""

    base: Side
    unlearned: Side


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """What a finished run left. Parts that it need not have are None or empty."""

    folder: Path
    manifest: Mapping[str, Any]
    comparison: Comparison
    """Without rows."""
    table: tuple[TableRow, ...]
    attacks: AttackReport | None
    sweep: Sweep | None
    """Finished."""
    log: tuple[Mapping[str, float], ...]
    """Step and loss terms of each logged step."""
    pairs: tuple[ReplyPair, ...] | None
    """In the order in which the base was asked; None where the folder holds no replies, or they were not wanted."""
    labelled_by: str
    """Judge that labelled the replies; another than that of the results where they were judged again."""

    @property
    def title(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The whole recipe, as plain data."""
        recipe: Mapping[str, Any] = self.manifest["recipe"]
        return recipe

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.recipe["method"])

    @property
    def data(self) -> list[tuple[str, ...]]:
        """``DATA_COLUMNS`` of each set of data, in the order in which they were read."""
        data = self.recipe["data"]
        sets = {"forget": data["forget"], "retain": data["retain"]}
        for kind in ("normal", "harmful"):
            sets |= {f"{kind} {name}": found for name, found in data.get(kind, {}).items()}
        sets |= {name: data[name] for name in ("refusals", "misplaced_refusals") if data.get(name)}
        return [
            (
                name,
                str(source["source"]),
                str(source["location"]),
                str(source["revision"] or NOTHING),
                str(source["sha256"]),
                f"{source['rows_read']:,}",
                str(config.get("license") or source["licence"] or "unknown"),
            )
            for (name, config), source in zip(sets.items(), self.manifest["data"]["sources"], strict=False)
        ]

    @property
    def negates(self) -> bool:
        """Whether a bad model's task vector was subtracted: the base turns such a result round."""
        return self.method in NEGATING_METHODS

    @property
    def strength(self) -> float:
        """Alpha, or the strength of a method that does not negate."""
        return float(self.manifest["negation"]["alpha"])

    def parts(self) -> dict[Part, Path]:
        """What can be shared: ``model``, and ``adapter`` where the run left one."""
        return {
            part: self.folder / name
            for part, names in _SHARED.items()
            for name in names
            if (self.folder / name).is_dir()
        }


def read_run(folder: Path, *, replies: bool = True, within_run: bool = False) -> RecordedRun:
    """Reads a run folder.

    Args:
        folder: Made by ``sku run``, finished.
        replies: Read the replies too.
        within_run: The run is about to end: its results stand, and its manifest still says that it is running.

    Returns:
        The run.

    Raises:
        EvaluationError: The folder is none of a run, the run is unfinished, or a file is broken; in one line.
    """
    manifest = _read_manifest(folder, within_run=within_run)
    path, sweep_file = folder / RESULTS_FILE, folder / "sweep" / Sweep.FILE
    content = read_json_object(path, _AGAIN)
    check_schema(content, str(path), _AGAIN)
    pairs, judge = _read_pairs(folder / "evaluation") if replies else (None, "")
    sweep = Sweep.read(sweep_file.parent) if sweep_file.exists() else None
    if sweep is not None and sweep.pick is None:
        raise EvaluationError(f"{sweep_file} is not finished: {_SWEEP_AGAIN}, it goes on where it stopped")
    with fits_schema(folder):
        if content["manifest"]["recipe_sha256"] != manifest["recipe_sha256"]:
            raise EvaluationError(f"{path} belongs to another recipe than {MANIFEST_FILE} beside it: {_AGAIN}")
        attacks = content.get("attacks")
        return RecordedRun(
            folder=folder,
            manifest=manifest,
            comparison=Comparison.from_dict(content, str(path), _AGAIN),
            table=tuple(from_plain(TableRow, row, f"{path}: table", _AGAIN) for row in content["table"]),
            attacks=None if attacks is None else AttackReport.from_dict(attacks, f"{path}: attacks"),
            sweep=sweep,
            log=_read_log(folder / LOG_FILE),
            pairs=pairs,
            labelled_by=judge,
        )


@contextmanager
def fits_schema(folder: Path) -> Iterator[None]:
    """Whatever a record of a run lacks inside the block is one line.

    Raises:
        EvaluationError: It lacks something.
    """
    try:
        yield
    except EvaluationError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, UndefinedError) as error:
        raise EvaluationError(
            f"{RESULTS_FILE} or {MANIFEST_FILE} in {folder} doesn't fit its schema ({error!r}): {_AGAIN}"
        ) from error


def _read_manifest(folder: Path, *, within_run: bool) -> dict[str, Any]:
    path = folder / MANIFEST_FILE
    if is_marked_hazardous(folder):
        raise EvaluationError(f"{folder} is a bad model of stage 1: it is hazardous and never shared")
    if not folder.is_dir():
        raise EvaluationError(f"{folder} is no folder; name the folder that sku run wrote")
    if not path.exists():
        compared = (folder / "comparison.json").exists()
        instead = f"sku results {folder} shows it" if compared else "name the folder that sku run wrote"
        raise EvaluationError(f"{folder} is no run folder: it has no {MANIFEST_FILE}; {instead}")
    manifest = read_json_object(path, _AGAIN)
    check_schema(manifest, str(path), _AGAIN)
    if manifest.get("status") != "complete" and not within_run:
        raise EvaluationError(f"the run in {folder} is not finished: go on with sku run ... --out {folder} --resume")
    for name in ("recipe", "environment", "data", "model", "seconds"):
        if not isinstance(manifest.get(name), dict):
            raise EvaluationError(f"{path} doesn't fit its schema ({name} is missing or of another type): {_AGAIN}")
    return manifest


def _read_log(path: Path) -> tuple[Mapping[str, float], ...]:
    """Logged steps that have a loss; empty where there is no log."""
    if not path.exists():
        return ()
    entries: list[Mapping[str, float]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            entry = json.loads(line)
            if "loss" in entry:
                losses = {name: float(value) for name, value in entry.items() if name.startswith("loss")}
                entries.append({"step": float(entry["step"]), **losses})
        except (ValueError, TypeError, KeyError):
            raise EvaluationError(f"{path} line {number} is no entry of a training log: {_AGAIN}") from None
    return tuple(entries)


def _read_pairs(evaluation: Path) -> tuple[tuple[ReplyPair, ...] | None, str]:
    """The replies of both models, prompt by prompt, and the judge that labelled them; None where there are none."""
    base, unlearned = evaluation / "base", evaluation / "unlearned"
    if not any((folder / GENERATIONS_FILE).exists() for folder in (base, unlearned)):
        return None, ""
    before, judge = _sides(base)
    after, other_judge = _sides(unlearned)
    if before.keys() != after.keys():
        raise EvaluationError(f"{base} and {unlearned} hold replies to different prompts: evaluate both again")
    if judge != other_judge:
        raise EvaluationError(
            f"{base} was judged by {judge} and {unlearned} by {other_judge}: judge both again with one of them"
        )
    return tuple(ReplyPair(base=side, unlearned=after[name]) for name, side in before.items()), judge


def _sides(folder: Path) -> tuple[dict[str, Side], str]:
    _, records = read_generations(folder / GENERATIONS_FILE)
    header, outcomes = read_rows(folder / OUTCOMES_FILE, ReplyOutcome)
    found = {outcome.id: outcome for outcome in outcomes}
    if found.keys() != {record.id for record in records}:
        raise EvaluationError(f"{folder / OUTCOMES_FILE} labels other replies than {GENERATIONS_FILE}: evaluate again")
    return {record.id: Side(record=record, outcome=found[record.id]) for record in records}, str(header.get("judge"))
