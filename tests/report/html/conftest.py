"""One invented run, written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from sku.report.page import Page, run_page
from sku.report.read_run import RecordedRun, read_run

from .recorded import write_run


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With every part. Copy it before you change it."""
    return write_run(tmp_path_factory.mktemp("report") / "invented")


@pytest.fixture(scope="session")
def run(run_folder: Path) -> RecordedRun:
    return read_run(run_folder)


@pytest.fixture(scope="session")
def page(run: RecordedRun) -> Page:
    return run_page(run)
