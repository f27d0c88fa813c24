"""Runs the jobs of a comparison one after the other, each record kept as soon as it stands.

A comparison folder::

    records/<row>--seed<k>.json   one per row and seed (report/method_records.py)
    work/                         checkpoints of the job in progress, private; gone when all is done
    .lock                         held by the process that writes the comparison; gone when it ends
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from sku.comparison.bench import Bench
from sku.comparison.jobs import Job, record_of
from sku.comparison.worker import OtherProcess
from sku.errors import EvaluationError, ProcessError
from sku.evaluate.batching import StageProgress
from sku.methods.run import resolve_method
from sku.report.method_records import MethodRecord, read_record
from sku.reproducibility import content_sha256
from sku.storage import LOCK_FILE, check_place, mark_hazardous, named_disk_errors, own_by_file, write_json

RECORDS, WORK = "records", "work"
"""Folders of a comparison."""
JOBS_STAGE = "jobs"
"""Stage of the progress that counts whole jobs."""


@dataclass(frozen=True, kw_only=True)
class FinishedComparison:
    """What a comparison gives back."""

    folder: Path
    records: list[MethodRecord]
    """In the order of the jobs."""
    reused: int
    """Records of an earlier run that still fit."""


def run_comparison(
    jobs: Sequence[Job],
    out: Path,
    *,
    progress: StageProgress | None = None,
    on_record: Callable[[MethodRecord, bool], None] | None = None,
    isolate: bool = True,
) -> FinishedComparison:
    """Runs jobs one at a time; complete records that are already there and fit are kept as they are.

    Args:
        jobs: From ``comparison_jobs`` or ``ablation_jobs``.
        out: Folder of the comparison, new or of an earlier run of it.
        progress: Called with stage, done and total.
        on_record: Called with each record as soon as it stands, and whether it was there already.
        isolate: Run the jobs in a process of their own, which is started anew when one of them dies with it (killed
            for memory): the others go on. Without it such a death ends all.

    Returns:
        All records, failed ones included.

    Raises:
        RecipeError: A setting of some job is unknown or impossible, before any is run.
        OutputError: The folder can't be written, or another process is writing it.
        SkuError: Data or model can't be loaded.
    """
    check_place(out)
    check_jobs(jobs, out)
    records: list[MethodRecord] = []
    reused = 0
    with (
        _own_folder(out),
        _isolated(out, progress) if isolate else nullcontext(JobRunner(out, progress)) as run,
    ):
        for number, job in enumerate(jobs):
            if progress is not None:
                progress(JOBS_STAGE, number, len(jobs))
            record, was_there = run(job)
            records.append(record)
            reused += was_there
            if on_record is not None:
                on_record(record, was_there)
    if progress is not None:
        progress(JOBS_STAGE, len(jobs), len(jobs))
    return FinishedComparison(folder=out, records=records, reused=reused)


def check_jobs(jobs: Sequence[Job], out: Path) -> None:
    """Refuses a comparison before any job is run.

    Args:
        jobs: Of the comparison.
        out: Its folder.

    Raises:
        RecipeError: A setting of some job is unknown or impossible.
    """
    for job in jobs:
        resolve_method(job.recipe, out / WORK)


def record_path(out: Path, job: Job) -> Path:
    """Where a job's record stands."""
    return out / RECORDS / f"{job.id}.json"


@contextmanager
def _own_folder(out: Path) -> Iterator[None]:
    """Makes the folder, in which no other process runs a comparison before the block ends; empty it doesn't stay."""
    new = [folder for folder in (out / RECORDS, out) if not folder.exists()]
    with named_disk_errors(out):
        (out / RECORDS).mkdir(parents=True, exist_ok=True)
        lock = own_by_file(out)
    try:
        mark_hazardous(out / WORK)
        yield
    finally:
        shutil.rmtree(out / WORK, ignore_errors=True)
        with suppress(OSError):  # Where there are records, the folders stay.
            (out / LOCK_FILE).unlink()
            for folder in new:
                folder.rmdir()
        os.close(lock)


class JobRunner:
    """Runs jobs in this process, each record kept as soon as it stands; a bench is kept as long as they share one."""

    def __init__(self, out: Path, progress: StageProgress | None) -> None:
        self._out, self._progress = out, progress
        self._bench: tuple[str, Bench] | None = None

    def __call__(self, job: Job) -> tuple[MethodRecord, bool]:
        """The record of a job, and whether it was there already."""
        bench, path = self._bench_for(job), record_path(self._out, job)
        kept = _kept(path, bench.key(job))
        if kept is not None:
            return kept, True
        record = bench.run(job)
        write_json(path, record.to_dict())
        return record, False

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


@contextmanager
def _isolated(out: Path, progress: StageProgress | None) -> Iterator[Callable[[Job], tuple[MethodRecord, bool]]]:
    """Runs jobs in one other process, which is replaced when it dies."""
    process: OtherProcess | None = None

    def run(job: Job) -> tuple[MethodRecord, bool]:
        nonlocal process
        process = process or OtherProcess(JobRunner, out, progress=progress)
        try:
            record, was_there = process.call(job)
        except ProcessError as died:
            shutil.rmtree(out / WORK / job.id, ignore_errors=True)
            record, was_there = record_of(job, "", failure=str(died)), False
            write_json(record_path(out, job), record.to_dict())
        if record.status == "failed":
            # Dead, or left unusable and full by an error on a GPU: the next job gets a new process.
            process.end()
            process = None
        return record, was_there

    at_once = True  # An interrupt must not wait for the end of a training.
    try:
        yield run
        at_once = False
    finally:
        if process is not None:
            process.end(at_once=at_once)
