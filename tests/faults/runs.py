"""Small whole runs: how far one has come, what an unfinished one may leave, and when two are equal."""

from __future__ import annotations

import hashlib
import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sku.storage import hazardous_folders, is_marked_hazardous

WHOLE = {
    "acquire.training.max_steps": "3", "acquire.training.save_steps": "1", "acquire.training.logging_steps": "1",
    "data.forget.limit": "60", "data.retain.limit": "60", "evaluate.prompts": "4", "evaluate.retain_prompts": "4",
    "evaluate.max_new_tokens": "8", "evaluate.samples": "2", "evaluate.attacks": "[]",
    "negate.alpha": "1.25", "acquire.training.per_device_train_batch_size": "4",
    "evaluate.prefill_tokens": "[1, 5]",
}  # fmt: skip
"""Every phase of a run, and little to do in each."""
ADAPTER = {
    **WHOLE, "acquire.tuning": "lora", "acquire.lora.r": "4", "acquire.training.learning_rate": "1e-2",
    "negate.alpha": "1.0", "keep_bad_model": "true", "acquire.check": "false",
}  # fmt: skip
"""With an adapter, and a bad model that stays."""
SWEPT = {
    **WHOLE, "negate.alpha": "auto", "evaluate.samples": "0", "evaluate.max_new_tokens": "16",
    "sweep": "{alphas: [0.25, 0.5], prompts: 4, retain_prompts: 6, if_none: nearest, utility_budget: 1.0e+9}",
}  # fmt: skip
"""Alpha is chosen on held-out data."""
_TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")


PHASES = (
    "data", "base evaluation", "stage 1", "stage 2", "sweep", "wipe", "result evaluation", "report", "complete",
)  # fmt: skip
"""In their order; a run with a given alpha has no sweep, and one that keeps its bad model no wipe."""


def phase_of(run: Path, *, keeps_bad: bool = False) -> str:
    """The phase in which a run is, or was when it died, read from its folder, which need not exist, alone.

    Where its bad model is kept, that model's folder says nothing.
    """
    evaluation = run / "evaluation"
    if (run / "unlearned").exists():
        if (run / "bad").exists() and not keeps_bad:
            return "wipe"
        if not (evaluation / "unlearned" / "evaluation.json").exists():
            return "result evaluation"
        return "complete" if _read(run / "manifest.json")["status"] == "complete" else "report"
    if (run / "sweep").exists() and not (run / "sweep" / "frontier.svg").exists():
        return "sweep"
    if (run / "bad" / "final").exists():
        return "stage 2"
    if (run / "bad").exists() or (evaluation / "base" / "evaluation.json").exists():
        return "stage 1"
    return "base evaluation" if evaluation.exists() else "data"


@dataclass(frozen=True)
class Finished:
    """A run that nobody disturbed."""

    folder: Path
    operations: list[dict[str, str]]
    """What it did to files: ``phase``, ``event``, ``path``."""

    def count(self, phase: str) -> int:
        """Number of file operations in a phase."""
        return sum(operation["phase"] == phase for operation in self.operations)


def keeps_bad(settings: dict[str, str]) -> bool:
    """Whether a run with these settings keeps its bad model."""
    return settings.get("keep_bad_model") == "true"


def words_of(settings: dict[str, str]) -> list[str]:
    """Settings as words of a command."""
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def sha256(path: Path) -> str:
    """Of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hashes_below(folder: Path) -> dict[str, str]:
    """Path -> hash of every file below a folder."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def check_leavings(place: Path, run: Path, finished: Path) -> None:
    """Checks what a run that has died left, wherever it died.

    A model's name stands for a whole model; weights of stage 1 are behind 0700, marked, and found by ``sku wipe``;
    nothing else that can be loaded is in the place around it. ``finished`` is an equal run that nobody disturbed.
    """
    for folder in sorted({path.parent for path in place.rglob("*") if path.suffix in _WEIGHTS}):
        own = folder.relative_to(run).parts[0] if folder.is_relative_to(run) else ""
        if own in ("unlearned", "negated_adapter"):
            found, whole = _model(folder), _model(finished / own)
            different = {name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name)}
            assert not different, f"{folder} is no whole model: {different}"
            continue
        assert _is_private(folder, place), f"{folder} can be entered by others"
        if own == "bad" or own.startswith(".bad"):
            assert stat.S_IMODE((run / own).stat().st_mode) == 0o700, f"{run / own} can be entered by others"
            assert is_marked_hazardous(folder), f"{folder} is not marked"
            removable = hazardous_folders(place)
            assert any(folder.is_relative_to(marked) for marked in removable), f"sku wipe doesn't find {folder}"
        else:
            assert folder.name.endswith(".unfinished"), f"{folder} is no place for weights"
    if (run / "manifest.json").exists():
        assert _read(run / "manifest.json")["status"] in ("running", "complete")


def _model(folder: Path) -> dict[str, str]:
    """The files of a model, less its card, which comes last."""
    return {name: text for name, text in hashes_below(folder).items() if name != "README.md" and name[0] != "."}


def _is_private(folder: Path, place: Path) -> bool:
    """Whether a folder, or one around it, is its owner's alone."""
    around = [folder, *(parent for parent in folder.parents if parent.is_relative_to(place) and parent != place)]
    return any(stat.S_IMODE(path.stat().st_mode) == 0o700 for path in around)


def check_equal_runs(run: Path, finished: Path) -> None:
    """Checks that a run ended like another: same files, same weights to the bit, same results but for times."""
    first, second = ({str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (run, finished))
    assert first == second
    for path in finished.rglob("*"):
        name = path.relative_to(finished)
        rows = path.suffix == ".jsonl" and path.name != "training_log.jsonl"
        if rows or path.suffix == ".safetensors" or path.name in ("evaluation.json", "sweep.json", "config.json"):
            assert sha256(run / name) == sha256(path), f"{name} differs"
    assert _untimed(run) == _untimed(finished)
    if (run / "bad").exists():
        for folder in (run / "bad", run / "bad" / "final"):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert is_marked_hazardous(folder)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _untimed(run: Path) -> list[Any]:
    """Results, manifest and training log without what differs from time to time."""
    results, manifest = _read(run / "results.json"), _read(run / "manifest.json")
    for own in (results["manifest"], manifest):
        del own["seconds"], own["environment"], own["training"]["seconds"]
    lines = (run / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    log = [{key: value for key, value in json.loads(line).items() if key not in _TIMES} for line in lines]
    return [results, manifest, log]
