"""Runs the jobs of a comparison one after the other, each record kept as soon as it stands.

A comparison folder::

    records/<row>--seed<k>.json   one per row and seed (report/method_records.py)
    work/                         checkpoints of the job in progress, private; empty when it ends
"""

from __future__ import annotations

import multiprocessing
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

from sku.comparison.bench import Bench, Progress, failed_record
from sku.comparison.jobs import Job
from sku.errors import EvaluationError, OutputError
from sku.methods.run import prepare
from sku.quiet import quiet_libraries
from sku.report.method_records import MethodRecord, read_record
from sku.reproducibility import content_sha256
from sku.storage import mark_hazardous, write_json

RECORDS, WORK = "records", "work"
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
    jobs: Sequence[Job], out: Path, *, progress: Progress | None = None, isolate: bool = True
) -> FinishedComparison:
    """Runs jobs one at a time; complete records that are already there and fit are kept as they are.

    Args:
        jobs: From ``comparison_jobs`` or ``ablation_jobs``.
        out: Folder of the comparison, new or of an earlier run of it.
        progress: Called with stage, done and total.
        isolate: Run the jobs in a process of their own, which is started anew when one of them dies with it (killed
            for memory): the others go on. Without it such a death ends all.

    Returns:
        All records, failed ones included.

    Raises:
        RecipeError: A setting of some job is unknown or impossible, before any is run.
        OutputError: The folder can't be written.
        SkuError: Data or model can't be loaded.
    """
    for job in jobs:
        prepare(job.recipe, out / WORK)
    try:
        (out / RECORDS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} can't be written: {error.strerror or error}") from error
    mark_hazardous(out / WORK)
    records: list[MethodRecord] = []
    reused = 0
    runner = _Isolated(out, progress) if isolate else _InProcess(out, progress)
    try:
        for number, job in enumerate(jobs):
            if progress is not None:
                progress(JOBS_STAGE, number, len(jobs))
            record, was_there = runner.run(job)
            records.append(record)
            reused += was_there
    finally:
        runner.close()
        shutil.rmtree(out / WORK, ignore_errors=True)
    if progress is not None:
        progress(JOBS_STAGE, len(jobs), len(jobs))
    return FinishedComparison(folder=out, records=records, reused=reused)


def record_path(out: Path, job: Job) -> Path:
    """Where a job's record stands."""
    return out / RECORDS / f"{job.id}.json"


class _InProcess:
    """Runs jobs here; benches are kept as long as the jobs share one."""

    def __init__(self, out: Path, progress: Progress | None) -> None:
        self._out, self._progress = out, progress
        self._bench: tuple[str, Bench] | None = None

    def run(self, job: Job) -> tuple[MethodRecord, bool]:
        bench, path = self._bench_for(job), record_path(self._out, job)
        kept = _kept(path, bench.key(job))
        if kept is not None:
            return kept, True
        record = bench.run(job)
        write_json(path, record.to_dict())
        return record, False

    def close(self) -> None:
        self._bench = None

    def _bench_for(self, job: Job) -> Bench:
        recipe = job.recipe.to_dict()
        shared = content_sha256([recipe[name] for name in ("model", "data", "seed", "evaluate")])
        shared += job.recipe.acquire.tuning  # It decides the type the weights are held in.
        if self._bench is None or self._bench[0] != shared:
            self._bench = None  # Lets go of the models before new ones are loaded.
            self._bench = (shared, Bench(job.recipe, self._out / WORK, self._progress))
        return self._bench[1]


class _Isolated:
    """Runs jobs in one other process, which is replaced when it dies."""

    def __init__(self, out: Path, progress: Progress | None) -> None:
        self._out, self._context = out, multiprocessing.get_context("spawn")
        self._messages: Queue[tuple[str, int, int] | None] = self._context.Queue()
        self._listener = threading.Thread(target=self._listen, args=(progress,), daemon=True)
        self._listener.start()
        self._pool: ProcessPoolExecutor | None = None

    def run(self, job: Job) -> tuple[MethodRecord, bool]:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                max_workers=1, mp_context=self._context, initializer=_begin, initargs=(self._out, self._messages)
            )
        try:
            return self._pool.submit(_work, job).result()
        except BrokenProcessPool:
            self._pool.shutdown(wait=False)
            self._pool = None
            shutil.rmtree(self._out / WORK / job.id, ignore_errors=True)
            reason = "the process died without a word: most likely it was killed because memory ran out"
            record = failed_record(job, "", reason)
            write_json(record_path(self._out, job), record.to_dict())
            return record, False

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._messages.put(None)
        self._listener.join(timeout=5)

    def _listen(self, progress: Progress | None) -> None:
        while (message := self._messages.get()) is not None:
            if progress is not None:
                progress(*message)


_worker: _InProcess | None = None


def _begin(out: Path, messages: Any) -> None:
    """Sets the process up: libraries quiet, progress sent to the parent."""
    global _worker
    quiet_libraries()
    _worker = _InProcess(out, lambda *message: messages.put(message))


def _work(job: Job) -> tuple[MethodRecord, bool]:
    assert _worker is not None
    return _worker.run(job)


def _kept(path: Path, key: str) -> MethodRecord | None:
    """A complete record of the same key; a failed one is tried again, a damaged one is made anew."""
    try:
        record = read_record(path)
    except EvaluationError:
        return None
    return record if record.status == "complete" and record.key == key else None
