"""A run's folder: what lies where in it, read once and checked. All that is shown of a run comes from here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from sku.attacks import AttackReport
from sku.config.recipe import NEGATING_METHODS
from sku.errors import EvaluationError
from sku.evaluate.comparison import Comparison
from sku.evaluate.judges import JudgeCard
from sku.evaluate.metrics import ReplyOutcome
from sku.evaluate.records import (
    GENERATIONS_FILE,
    NORMAL_SPLITS,
    OUTCOMES_FILE,
    GenerationRecord,
    check_schema,
    from_plain,
    read_generations,
    read_json_object,
    read_rows,
)
from sku.evaluate.results import EvaluationResult
from sku.report.words import NOTHING, TableRow, percent
from sku.storage import is_marked_hazardous
from sku.sweep import SWEEP_FILE, Sweep, read_sweep

Part = Literal["model", "adapter"]
"""What of a run can be shared."""
MANIFEST_FILE, RESULTS_FILE, LOG_FILE = "manifest.json", "results.json", "training_log.jsonl"
_EVALUATION, _SWEEP = "evaluation", "sweep"
_SHARED: Mapping[Part, tuple[str, ...]] = {"model": ("unlearned",), "adapter": ("negated_adapter", "adapter")}
_SHOWN_OUTCOMES = ("refusal", "safe_answer", "evasive")
"""Outcomes of replies to harmful prompts that are shown as they are; all others are blurred."""
_AGAIN, _SWEEP_AGAIN = "run again into a new folder", "run sku sweep again"
DATA_COLUMNS = ("set", "format", "location", "revision", "SHA-256", "rows read", "licence")
Manifest = Mapping[str, Any]
Words = tuple[tuple[str, str], ...]
"""Name and value."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One model's reply and what it came to."""

    record: GenerationRecord
    outcome: ReplyOutcome

    @property
    def hidden(self) -> bool:
        """Whether a reader must ask before it is shown."""
        if self.record.split in NORMAL_SPLITS:
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
    vector: TaskVectorFacts | None
    reproduction: Reproduction

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
    path, sweep = folder / RESULTS_FILE, folder / _SWEEP / SWEEP_FILE
    content = read_json_object(path, _AGAIN)
    check_schema(content, str(path), _AGAIN)
    pairs, judge = _read_pairs(folder / _EVALUATION) if replies else (None, "")
    try:
        if content["manifest"]["recipe_sha256"] != manifest["recipe_sha256"]:
            raise EvaluationError(f"{path} belongs to another recipe than {MANIFEST_FILE} beside it: {_AGAIN}")
        comparison = Comparison.from_dict(content, str(path), _AGAIN)
        attacks, negation = content.get("attacks"), manifest.get("negation", {})
        return RecordedRun(
            folder=folder,
            manifest=manifest,
            comparison=comparison,
            table=tuple(from_plain(TableRow, row, f"{path}: table", _AGAIN) for row in content["table"]),
            attacks=None if attacks is None else AttackReport.from_dict(attacks, f"{path}: attacks"),
            sweep=_read_sweep(sweep) if sweep.exists() else None,
            log=_read_log(folder / LOG_FILE),
            pairs=pairs,
            labelled_by=judge,
            vector=task_vector_facts(negation),
            reproduction=reproduction_of(manifest, comparison.unlearned),
        )
    except EvaluationError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EvaluationError(
            f"{path} or {MANIFEST_FILE} beside it doesn't fit its schema ({error!r}): {_AGAIN}"
        ) from None


def _read_manifest(folder: Path, *, within_run: bool) -> dict[str, Any]:
    path = folder / MANIFEST_FILE
    if is_marked_hazardous(folder):
        raise EvaluationError(f"{folder} is a bad model of stage 1: it is hazardous and never shared")
    if not folder.is_dir():
        raise EvaluationError(f"{folder} is no folder; name the folder that sku run wrote")
    if not path.exists():
        raise EvaluationError(f"{folder} is no run folder: it has no {MANIFEST_FILE}; {_instead(folder)}")
    manifest = read_json_object(path, _AGAIN)
    check_schema(manifest, str(path), _AGAIN)
    if manifest.get("status") != "complete" and not within_run:
        raise EvaluationError(f"the run in {folder} is not finished: go on with sku run ... --out {folder} --resume")
    for name in ("recipe", "environment", "data", "model", "seconds"):
        if not isinstance(manifest.get(name), dict):
            raise EvaluationError(f"{path} doesn't fit its schema ({name} is missing or of another type): {_AGAIN}")
    return manifest


def _instead(folder: Path) -> str:
    """What to do with a folder that something else than ``sku run`` wrote."""
    if (folder / "comparison.json").exists():
        return f"it holds a comparison of methods, which sku results {folder} shows"
    if (folder / "base" / "evaluation.json").exists():
        return "it holds evaluations without a run, whose figures sku evaluate printed"
    if (folder / "evaluation.json").exists():
        return "it holds one evaluation; name the folder of the whole run"
    return "name the folder that sku run wrote"


def _read_sweep(path: Path) -> Sweep:
    found = read_sweep(path, _SWEEP_AGAIN)
    if found.pick is None:
        raise EvaluationError(
            f"{path} is of a sweep that is not finished: {_SWEEP_AGAIN}, it goes on where it stopped"
        )
    return found


def _read_log(path: Path) -> tuple[Mapping[str, float], ...]:
    """Logged steps that have a loss; empty where there is no log."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeError) as error:
        raise EvaluationError(f"{path} can't be read: {error}") from None
    entries: list[Mapping[str, float]] = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if "loss" in entry:
                kept = {name: value for name, value in entry.items() if name == "step" or name.startswith("loss")}
                entries.append({name: float(value) for name, value in kept.items()})
                assert "step" in kept
        except (ValueError, TypeError, AssertionError):
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
    for outcome in outcomes:
        if outcome.p_harmful is not None and not math.isfinite(outcome.p_harmful):
            raise EvaluationError(f"{folder / OUTCOMES_FILE}: p_harmful of {outcome.id} is no number: judge again")
    return {record.id: Side(record=record, outcome=found[record.id]) for record in records}, str(header.get("judge"))


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """Of one run, in words."""

    command: str
    recipe_yaml: str
    """The whole recipe; as a file it makes the same run."""
    facts: Words
    packages: Words
    data: tuple[tuple[str, ...], ...]
    """Rows of ``DATA_COLUMNS``."""
    splits: Words
    seconds: Words


def reproduction_of(manifest: Manifest, unlearned: EvaluationResult) -> Reproduction:
    """Reads it from a manifest and, for judge and weights, from the run's evaluation.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: The manifest holds something else.
    """
    environment, data, seconds = manifest["environment"], manifest["data"], manifest["seconds"]
    return Reproduction(
        command=str(environment["command"]),
        recipe_yaml=yaml.safe_dump(manifest["recipe"], sort_keys=False, allow_unicode=True, width=100),
        facts=tuple(_facts(manifest, unlearned)),
        packages=tuple((str(name), str(version)) for name, version in environment["packages"].items()),
        data=tuple(
            (
                role,
                str(source["source"]),
                str(source["location"]),
                str(source["revision"] or NOTHING),
                str(source["sha256"]),
                f"{source['rows_read']:,}",
                str(config.get("license") or source["licence"] or "unknown"),
            )
            for role, config, source in _data_sets(manifest)
        ),
        splits=tuple((str(name), f"{count:,}") for name, count in data["splits"].items()),
        seconds=tuple(
            (str(name).replace("_", " "), f"{float(value):.1f}")
            for name, value in (*seconds.items(), ("in all", sum(seconds.values())))
        ),
    )


def _data_sets(manifest: Manifest) -> Iterator[tuple[str, Any, Any]]:
    """What each set of data is, its part of the recipe and its source, in the order in which they were read."""
    data = manifest["recipe"]["data"]
    others = {f"{kind} {name}": found for kind in ("normal", "harmful") for name, found in data.get(kind, {}).items()}
    refusals = {name: data[name] for name in ("refusals", "misplaced_refusals") if data.get(name)}
    sets = {"forget": data["forget"], "retain": data["retain"], **others, **refusals}
    for (name, config), source in zip(sets.items(), manifest["data"]["sources"], strict=False):
        yield name, config, source


def _facts(manifest: Manifest, unlearned: EvaluationResult) -> Iterator[tuple[str, str]]:
    recipe, environment, model = manifest["recipe"], manifest["environment"], manifest["model"]
    training, after = recipe["acquire"]["seed"], unlearned.setup
    yield "recipe", f"{recipe['name']}, SHA-256 {manifest['recipe_sha256']}"
    yield "method", str(recipe["method"])
    yield "seed", f"{recipe['seed']}" + ("" if training is None else f", of training {training}")
    yield "SKU", f"{environment['sku']}, commit {environment['commit'] or 'not known: an installed package'}"
    yield "model", f"{model['name']}, revision {model['revision'] or NOTHING}, {model['parameters']:,} parameters"
    yield "weights after", f"{after.model['dtype']}, fingerprint {after.model['fingerprint']}"
    yield "prompts", f"format {after.prompt_format}"
    yield "judge", _judge(unlearned.judge)
    yield "Python", f"{environment['python']}, {environment['platform']}"
    yield "hardware", f"{environment['device']}; {environment['cpu']}, {environment['cpu_count']} cores"


def _judge(card: JudgeCard) -> str:
    revision = "" if card.revision is None else f", revision {card.revision}"
    return f"{card.name}, version {card.version}{revision}; errors: {card.errors_in_words}"


@dataclass(frozen=True, kw_only=True)
class TaskVectorFacts:
    """How long the change of a run is, and where."""

    layers: Mapping[str, float]
    """Number of a decoder layer, or ``others`` -> Euclidean norm."""
    modules: Mapping[str, float]
    """Kind of module -> Euclidean norm."""
    facts: Words


def task_vector_facts(negation: Mapping[str, Any]) -> TaskVectorFacts | None:
    """Reads ``negation`` of a manifest; None where it holds no norms.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: It holds something else.
    """
    if "layers" not in negation:
        return None
    norm, base = float(negation["task_vector_norm"]), float(negation["base_norm"])
    facts = [("alpha", f"{float(negation['alpha']):g}"), ("Euclidean norm", f"{norm:.4g}")]
    if base:
        facts.append(("norm in units of the changed weights' own", percent(norm / base)))
    return TaskVectorFacts(
        layers={str(name): float(norm) for name, norm in negation["layers"].items()},
        modules={str(name): float(norm) for name, norm in negation["modules"].items()},
        facts=tuple(facts),
    )
