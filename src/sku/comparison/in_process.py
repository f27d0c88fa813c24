"""Jobs of a comparison in one process, each record kept as soon as it stands."""

from __future__ import annotations

from pathlib import Path

from sku.comparison.bench import Bench
from sku.comparison.jobs import Job
from sku.errors import EvaluationError
from sku.evaluate.batching import StageProgress
from sku.report.method_records import MethodRecord, read_record
from sku.reproducibility import content_sha256
from sku.storage import write_json

RECORDS, WORK = "records", "work"
"""Folders of a comparison."""


def record_path(out: Path, job: Job) -> Path:
    """Where a job's record stands."""
    return out / RECORDS / f"{job.id}.json"


class InProcess:
    """Runs jobs in this process; a bench is kept as long as the jobs share one."""

    def __init__(self, out: Path, progress: StageProgress | None) -> None:
        self._out, self._progress = out, progress
        self._bench: tuple[str, Bench] | None = None

    def run(self, job: Job) -> tuple[MethodRecord, bool]:
        """The record of a job, and whether it was there already."""
        bench, path = self._bench_for(job), record_path(self._out, job)
        kept = _kept(path, bench.key(job))
        if kept is not None:
            return kept, True
        record = bench.run(job)
        write_json(path, record.to_dict())
        return record, False

    def abort(self) -> None:
        """Nothing is left to end: the job in progress ended with the error that came through here."""

    def close(self) -> None:
        """Lets go of the models."""
        self._bench = None

    def _bench_for(self, job: Job) -> Bench:
        recipe = job.recipe.to_dict()
        shared = content_sha256([recipe[name] for name in ("model", "data", "seed", "evaluate")])
        shared += job.recipe.acquire.tuning  # It decides the type the weights are held in.
        shared += str(job.recipe.search_validation)  # It decides what the data holds.
        shared += content_sha256(recipe["acquire"]["training"])  # It decides which prompts are asked as trained on.
        if self._bench is None or self._bench[0] != shared:
            self._bench = None  # Lets go of the models before new ones are loaded.
            self._bench = (shared, Bench(job.recipe, self._out / WORK, self._progress, searches=self._out / RECORDS))
        return self._bench[1]


def _kept(path: Path, key: str) -> MethodRecord | None:
    """A complete record of the same key; a failed one is tried again, a damaged one is made anew."""
    try:
        record = read_record(path)
    except EvaluationError:
        return None
    return record if record.status == "complete" and record.key == key else None
