"""What runs in the process of its own. Light to import: libraries are told to be quiet before they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sku.quiet import quiet_libraries

if TYPE_CHECKING:
    from sku.comparison.in_process import InProcess
    from sku.comparison.jobs import Job
    from sku.report.method_records import MethodRecord

_runner: InProcess | None = None


def begin(out: Path, messages: Any) -> None:
    """Sets the process up; its progress goes to the parent.

    Args:
        out: Folder of the comparison.
        messages: Queue of ``(stage, done, total)``.
    """
    quiet_libraries()
    from sku.comparison.in_process import InProcess

    global _runner
    _runner = InProcess(out, lambda *message: messages.put(message))


def work(job: Job) -> tuple[MethodRecord, bool]:
    """Runs one job; whether its record was there already."""
    assert _runner is not None, "begin was called"
    return _runner.run(job)
