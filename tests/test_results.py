"""Tables of the documentation are those of the records that lie in ``results/``."""

from __future__ import annotations

from pathlib import Path

import pytest

from sku.comparison.jobs import row_names
from sku.report.comparison_report import brief_markdown, comparison_markdown, replace_block
from sku.report.method_records import read_records

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = sorted(path for path in (ROOT / "results").iterdir() if path.is_dir())
ORDER = row_names()


@pytest.mark.integration
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_the_page_shows_the_tables_of_the_records(folder: Path) -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert replace_block(page, folder.name, comparison_markdown(read_records(folder), ORDER)) == page, (
        f"run: sku results results/{folder.name} --update docs/results.md"
    )


def test_the_readme_shows_the_brief_table() -> None:
    folder = ROOT / "results" / "compare-embedded"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert replace_block(readme, f"{folder.name}-brief", brief_markdown(read_records(folder), ORDER)) == readme, (
        "run: sku results results/compare-embedded --brief --update README.md"
    )


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_records_come_from_a_commit_without_changes(folder: Path) -> None:
    for record in read_records(folder):
        commit = record.environment["commit"]
        assert commit is not None
        assert len(commit) == 40, f"{record.file_name}: {commit}"
