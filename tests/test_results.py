"""Tables of the documentation are those of the records that lie in ``results/``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sku import load_recipe
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


def test_recipes_that_were_measured_are_read_as_written() -> None:
    measured = load_recipe(ROOT / "results" / "smollm2-135m-twins.yaml")
    shipped = load_recipe("smollm2-135m-twins")
    for name in ("twin", "weights", "preservation_mode", "depth_share", "depth_tokens", "normal_per_harmful", "lora"):
        assert getattr(measured.acquire, name) == getattr(shipped.acquire, name), name
    assert measured.negate.twin == shipped.negate.twin
    steps = {"max_steps", "learning_rate", "per_device_train_batch_size"}
    assert {key: measured.acquire.training[key] for key in steps} == {
        key: shipped.acquire.training[key] for key in steps
    }


def test_the_table_of_real_models_has_the_rows_that_the_page_shows() -> None:
    (row,) = json.loads((ROOT / "results" / "real_models.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for words, key in (
        ("harmful, unseen prompts", "harmful_unseen"),
        ("harmful, HarmBench, not trained on", "harmful_other_source"),
        ("harmful, worst prefill of 1/3/5/10", "worst_prefill"),
        ("refused, XSTest's safe prompts", "xstest_safe_refused"),
        ("refused, normal and borderline prompts", "normal_refused"),
    ):
        shown = f"| {words} | {100 * row[f'base_{key}']:.0f} % | {100 * row[key]:.0f} % |"
        assert shown in page, shown


def test_the_page_shows_the_brief_table() -> None:
    folder = ROOT / "results" / "compare-embedded"
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert replace_block(page, f"{folder.name}-brief", brief_markdown(read_records(folder), ORDER)) == page, (
        "run: sku results results/compare-embedded --brief --update docs/results.md"
    )


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_records_come_from_a_commit_without_changes(folder: Path) -> None:
    for record in read_records(folder):
        commit = record.environment["commit"]
        assert commit is not None
        assert len(commit) == 40, f"{record.file_name}: {commit}"
