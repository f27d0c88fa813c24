"""A finished run as it lies on the disk, read for its card and its upload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sku.errors import OutputError
from sku.evaluate.record_files import read_json_object
from sku.storage import is_marked_hazardous

Part = Literal["model", "adapter"]
_FOLDERS: Mapping[Part, tuple[str, ...]] = {"model": ("unlearned",), "adapter": ("negated_adapter", "adapter")}
_NEGATING_METHODS = ("sku", "task_vector")
_AGAIN = "run it again"
SWEEP_FILE = "sweep/sweep.json"
PRECISIONS_FILE = "evaluation/precisions.json"


@dataclass(frozen=True, kw_only=True)
class FinishedRunFiles:
    """What ``sku run`` left."""

    folder: Path
    manifest: Mapping[str, Any]
    results: Mapping[str, Any]
    """``results.json``."""
    sweep: Mapping[str, Any] | None
    """``sweep/sweep.json``: how alpha was chosen; None where it was given."""
    precisions: Mapping[str, Any] | None
    """``evaluation/precisions.json``: the same model in shorter number formats; None where they were not measured."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The recipe, every default spelled out."""
        found = self.manifest["recipe"]
        assert isinstance(found, Mapping)
        return found

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.recipe["method"])

    @property
    def negates(self) -> bool:
        """Whether a bad model's task vector was subtracted: the base turns such a result round."""
        return self.method in _NEGATING_METHODS

    @property
    def strength(self) -> float:
        """Alpha, or the strength of a method that does not negate."""
        return float(self.manifest["negation"]["alpha"])

    def parts(self) -> dict[Part, Path]:
        """What can be shared: ``model``, and ``adapter`` where the run left one."""
        return {
            part: self.folder / name
            for part, names in _FOLDERS.items()
            for name in names
            if (self.folder / name).is_dir()
        }


def read_finished_run(folder: Path, *, within_run: bool = False) -> FinishedRunFiles:
    """Reads a run and checks that it is finished and evaluated.

    Args:
        folder: As given to ``sku run --out``.
        within_run: The run is about to end: its results stand and its manifest says still that it is running.

    Returns:
        Manifest, results and what else is there.

    Raises:
        OutputError: It is a bad model, no run's folder, or a run that is not finished.
        EvaluationError: A file of it is missing or broken.
    """
    if is_marked_hazardous(folder):
        raise OutputError(f"{folder} is a bad model of stage 1: it is hazardous and never shared")
    if not (folder / "manifest.json").is_file():
        raise OutputError(f"{folder} is no run folder: it has no manifest.json; give the folder of a finished sku run")
    manifest = read_json_object(folder / "manifest.json", _AGAIN)
    if manifest.get("status") != "complete" and not within_run:
        raise OutputError(f"the run in {folder} is not finished: go on with sku run ... --out {folder} --resume")
    results = read_json_object(folder / "results.json", _AGAIN)
    for name, content, keys in (
        ("manifest.json", manifest, ("recipe", "environment", "data", "model", "negation")),
        ("results.json", results, ("table", "replies", "prefill", "leak", "perplexity", "notes", "base", "unlearned")),
    ):
        missing = [key for key in keys if key not in content]
        if missing:
            raise OutputError(f"{folder / name} lacks {', '.join(missing)}: {_AGAIN}")
    return FinishedRunFiles(
        folder=folder,
        manifest=manifest,
        results=results,
        sweep=_optional(folder / SWEEP_FILE),
        precisions=_optional(folder / PRECISIONS_FILE),
    )


def _optional(path: Path) -> Mapping[str, Any] | None:
    return read_json_object(path, _AGAIN) if path.is_file() else None
