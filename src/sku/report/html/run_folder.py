"""A finished run, read from its folder and checked: everything that a report shows comes from here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sku.attacks.results import AttackReport
from sku.errors import EvaluationError
from sku.evaluate.comparison import LeakChange, PerplexityChange, RateChange
from sku.evaluate.leakage import Leak
from sku.evaluate.metrics import prefill_words
from sku.evaluate.record_files import GENERATIONS_FILE, check_schema, read_json_object
from sku.evaluate.results import EvaluationResult
from sku.evaluate.verdict import OverallVerdict
from sku.report.html.precisions_file import Precisions, precision_rows
from sku.report.html.reply_pairs import ReplyPair, read_reply_pairs
from sku.report.html.reproduction import Reproduction, reproduction_of
from sku.report.html.sweep_file import SWEEP_FILE, Sweep, read_sweep
from sku.report.html.task_vector_facts import TaskVectorFacts, survival_rows, task_vector_facts
from sku.report.tables import TableRow

SCHEMA_VERSION = 1
"""Of ``manifest.json`` and ``results.json``."""
_AGAIN = "run again into a new folder"
NO_VERDICT = "no verdict: an earlier version made this run and gave none; run again into a new folder"

Changes = Mapping[str, Mapping[str, RateChange]]


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """What a finished run left. Parts that it need not have are None or empty."""

    folder: Path
    title: str
    """Name of the folder."""
    manifest: Mapping[str, Any]
    verdict: OverallVerdict | None
    """None in a run of a version that gave none."""
    table: tuple[TableRow, ...]
    notes: tuple[str, ...]
    base: EvaluationResult
    unlearned: EvaluationResult
    replies: Changes
    prefill: Changes
    prefill_by_length: Mapping[str, Changes]
    """Split -> tokens given, as a word -> changes."""
    leak: Mapping[str, Mapping[str, LeakChange]]
    perplexity: Mapping[str, PerplexityChange]
    attacks: AttackReport | None
    log: tuple[Mapping[str, float], ...]
    """Step and loss terms of each logged step."""
    pairs: tuple[ReplyPair, ...] | None
    """None where the folder holds no replies."""
    labelled_by: str
    """Judge that labelled the replies; another than that of the results where they were judged again."""
    vector: TaskVectorFacts | None
    survival: tuple[tuple[str, ...], ...]
    """Rows of ``survival_rows``."""
    sweep: Sweep | None
    precisions: Precisions | None
    reproduction: Reproduction

    def prefill_label(self, split: str) -> str:
        """What is shown of the prefills: ``prefill, worst of 1/3/5/10 (3 tokens)``."""
        return prefill_words(map(int, self.unlearned.prefill[split]), self.unlearned.worst_prefill[split])

    @property
    def verdict_line(self) -> str:
        """The verdict in one line, or why there is none."""
        return _line_of(self.verdict)

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The whole recipe, as plain data."""
        recipe: Mapping[str, Any] = self.manifest["recipe"]
        return recipe


def verdict_line(folder: Path) -> str:
    """What a run that ``read_run`` takes came to, in one line."""
    return _line_of(_verdict(_read_object(folder / "results.json")))


def _verdict(content: Mapping[str, Any]) -> OverallVerdict | None:
    return OverallVerdict.from_dict(content["verdict"]) if "verdict" in content else None


def _line_of(verdict: OverallVerdict | None) -> str:
    return NO_VERDICT if verdict is None else verdict.line


def read_run(folder: Path, *, replies: bool = True) -> RecordedRun:
    """Reads a run folder.

    Args:
        folder: Made by ``sku run``, finished.
        replies: Read the replies too.

    Returns:
        The run.

    Raises:
        EvaluationError: The folder is none of a run, the run is unfinished, or a file is broken; in one line.
    """
    manifest = _read_manifest(folder)
    path = folder / "results.json"
    content = _read_object(path, manifest.get("recipe_sha256"))
    pairs, judge = _read_pairs(folder / "evaluation") if replies else (None, "")
    sweep = folder / SWEEP_FILE
    try:
        attacks, negation = content.get("attacks"), manifest.get("negation", {})
        unlearned = EvaluationResult.from_dict(content["unlearned"], f"{path}: unlearned")
        return RecordedRun(
            folder=folder,
            title=folder.resolve().name,
            manifest=manifest,
            verdict=_verdict(content),
            table=tuple(TableRow(**row) for row in content["table"]),
            notes=tuple(map(str, content["notes"])),
            base=EvaluationResult.from_dict(content["base"], f"{path}: base"),
            unlearned=unlearned,
            replies=_rate_changes(content["replies"]),
            prefill=_rate_changes(content["prefill"]),
            prefill_by_length={split: _rate_changes(of) for split, of in content["prefill_by_length"].items()},
            leak=_leak_changes(content["leak"]),
            perplexity={split: PerplexityChange(**value) for split, value in content["perplexity"].items()},
            attacks=None if attacks is None else AttackReport.from_dict(attacks, f"{path}: attacks"),
            log=_read_log(folder / "training_log.jsonl"),
            pairs=pairs,
            labelled_by=judge,
            vector=task_vector_facts(negation),
            survival=survival_rows(negation),
            sweep=read_sweep(sweep) if sweep.exists() else None,
            precisions=precision_rows(folder / "evaluation"),
            reproduction=reproduction_of(manifest, unlearned),
        )
    except EvaluationError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EvaluationError(
            f"{path} or manifest.json beside it doesn't fit its schema ({error!r}): {_AGAIN}"
        ) from None


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not folder.is_dir():
        raise EvaluationError(f"{folder} is no folder; name the folder that sku run wrote")
    if not path.exists():
        raise EvaluationError(f"{folder} is no run folder: it has no manifest.json; {_instead(folder)}")
    manifest = _read_object(path)
    if manifest.get("status") != "complete":
        raise EvaluationError(
            f"the run in {folder} is not finished (status {manifest.get('status')}): go on with the command that "
            f"began it and --out {folder} --resume"
        )
    kinds = {"recipe": dict, "environment": dict, "data": dict, "model": dict, "seconds": dict}
    for name, kind in kinds.items():
        if not isinstance(manifest.get(name), kind):
            raise EvaluationError(f"{path} doesn't fit its schema ({name} is missing or of another type): {_AGAIN}")
    return manifest


def _instead(folder: Path) -> str:
    """What to do with a folder that something else than ``sku run`` wrote."""
    for place in (folder, folder / "records"):
        if any(place.glob("*--seed*.json")):
            return f"it holds a comparison of methods, which sku results {place} shows"
    if (folder / "base" / "evaluation.json").exists():
        return "it holds evaluations without a run, whose figures sku evaluate printed"
    if (folder / "evaluation.json").exists():
        return "it holds one evaluation; name the folder of the whole run"
    return "name the folder that sku run wrote"


def _read_object(path: Path, recipe_sha256: object = None) -> dict[str, Any]:
    content = read_json_object(path, _AGAIN)
    check_schema(content, SCHEMA_VERSION, str(path), _AGAIN)
    if recipe_sha256 is not None:
        other = content.get("manifest")
        if not isinstance(other, dict) or other.get("recipe_sha256") != recipe_sha256:
            raise EvaluationError(f"{path} belongs to another recipe than manifest.json beside it: {_AGAIN}")
    return content


def _read_pairs(evaluation: Path) -> tuple[tuple[ReplyPair, ...] | None, str]:
    folders = evaluation / "base", evaluation / "unlearned"
    if not any((folder / GENERATIONS_FILE).exists() for folder in folders):
        return None, ""
    return read_reply_pairs(*folders)


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


def _rate_changes(plain: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, RateChange]]:
    return {
        split: {name: RateChange.from_dict(change) for name, change in rates.items()} for split, rates in plain.items()
    }


def _leak_changes(plain: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, LeakChange]]:
    return {
        split: {
            k: LeakChange(**{**change, "before": Leak(**change["before"]), "after": Leak(**change["after"])})
            for k, change in leaks.items()
        }
        for split, leaks in plain.items()
    }
