"""What the record of a job holds, however the job ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sku.comparison.jobs import Job
from sku.methods import method_named
from sku.report.method_records import MethodRecord
from sku.reproducibility import environment


def identity(job: Job) -> dict[str, Any]:
    """The fields of a record that tell which job it is of."""
    return {
        "name": job.name,
        "title": job.title,
        "method": method_named(job.recipe.method).name if job.kind == "method" else job.kind,
        "paper_url": job.paper_url,
        "control": job.kind != "method",
        "seed": job.seed,
        "recipe": job.recipe.to_dict(),
    }


def failed_record(job: Job, key: str, failure: str, data: Mapping[str, Any] | None = None) -> MethodRecord:
    """The record of a job that did not end well: it stays in the table, with the reason."""
    return MethodRecord(
        **identity(job),
        status="failed",
        failure=failure,
        key=key,
        environment=environment(),
        data=dict(data or {}),
        training={},
        asked={},
        tokens={},
        points=(),
        judge={},
    )
