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

from sku.comparison.in_process import RECORDS, WORK, InProcess, record_path
from sku.comparison.jobs import Job, failed_record
from sku.comparison.worker import begin, work
from sku.evaluate.batching import StageProgress
from sku.methods.run import prepare
from sku.report.method_records import MethodRecord
from sku.storage import LOCK_FILE, check_place, mark_hazardous, named_disk_errors, own_by_file, write_json

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
