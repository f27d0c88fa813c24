"""Runs the jobs of a comparison one after the other, each record kept as soon as it stands.

A comparison folder::

    records/<row>--seed<k>.json   one per row and seed (report/method_records.py)
    work/                         checkpoints of the job in progress, private; gone when all is done
    .lock                         held by the process that writes the comparison; gone when it ends
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path

from sku.comparison.bench import Bench
from sku.comparison.jobs import Job, failed_record
from sku.comparison.worker import begin, work
from sku.errors import EvaluationError
from sku.evaluate.batching import StageProgress
from sku.methods.run import prepare
from sku.report.method_records import MethodRecord, read_record
from sku.reproducibility import content_sha256
from sku.storage import LOCK_FILE, check_place, mark_hazardous, named_disk_errors, own_by_file, write_json

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
    with _own_folder(out):
        mark_hazardous(out / WORK)
        runner = _Isolated(out, progress) if isolate else InProcess(out, progress)
        try:
            for number, job in enumerate(jobs):
                if progress is not None:
                    progress(JOBS_STAGE, number, len(jobs))
                record, was_there = runner.run(job)
                records.append(record)
                reused += was_there
                if on_record is not None:
                    on_record(record, was_there)
        except BaseException:
            runner.abort()
            raise
        finally:
            runner.close()
            shutil.rmtree(out / WORK, ignore_errors=True)
    if progress is not None:
        progress(JOBS_STAGE, len(jobs), len(jobs))
    return FinishedComparison(folder=out, records=records, reused=reused)


@contextmanager
def _own_folder(out: Path) -> Iterator[None]:
    """Makes the folder, in which no other process runs a comparison before the block ends; empty it doesn't stay."""
    new = [folder for folder in (out / RECORDS, out) if not folder.exists()]
    with named_disk_errors(out):
        (out / RECORDS).mkdir(parents=True, exist_ok=True)
        lock = own_by_file(out)
    try:
        yield
    finally:
        with suppress(OSError):  # Where there are records, the folders stay.
            (out / LOCK_FILE).unlink()
            for folder in new:
                folder.rmdir()
        os.close(lock)


def check_jobs(jobs: Sequence[Job], out: Path) -> None:
    """Refuses a comparison before any job is run.

    Args:
        jobs: Of the comparison.
        out: Its folder.

    Raises:
        RecipeError: A setting of some job is unknown or impossible.
    """
    for job in jobs:
        prepare(job.recipe, out / WORK)


class _Isolated:
    """Runs jobs in one other process, which is replaced when it dies."""

    def __init__(self, out: Path, progress: StageProgress | None) -> None:
        self._out, self._context = out, multiprocessing.get_context("spawn")
        self._messages: Queue[tuple[str, int, int] | None] = self._context.Queue()
        self._listener = threading.Thread(target=self._listen, args=(progress,), daemon=True)
        self._listener.start()
        self._pool: ProcessPoolExecutor | None = None
        self._worker_pid: int | None = None

    def run(self, job: Job) -> tuple[MethodRecord, bool]:
        pool = self._pool or ProcessPoolExecutor(
            max_workers=1, mp_context=self._context, initializer=begin, initargs=(self._out, self._messages)
        )
        self._pool = pool
        try:
            self._worker_pid = pool.submit(os.getpid).result()
            record, was_there = pool.submit(work, job).result()
        except BrokenProcessPool:
            shutil.rmtree(self._out / WORK / job.id, ignore_errors=True)
            reason = "the process died without a word: most likely it was killed because memory ran out"
            record, was_there = failed_record(job, "", reason), False
            write_json(record_path(self._out, job), record.to_dict())
        if record.status == "failed":
            # Dead, or left unusable and full by an error on a GPU: the next job gets a new process.
            pool.shutdown(wait=True)
            self._pool = None
        return record, was_there

    def abort(self) -> None:
        """Ends the job in progress at once: an interrupt must not wait for the end of a training."""
        for child in multiprocessing.active_children():
            if child.pid == self._worker_pid:
                child.terminate()
                child.join(timeout=10)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._messages.put(None)
        self._listener.join(timeout=5)

    def _listen(self, progress: StageProgress | None) -> None:
        while (message := self._messages.get()) is not None:
            if progress is not None:
                progress(*message)
