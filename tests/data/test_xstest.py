"""XSTest prompts: both kinds, none of the run's own, nothing skipped quietly."""

from __future__ import annotations

from pathlib import Path

import pytest

from sku.data.examples import RetainExample
from sku.data.sources.read import load_xstest
from sku.errors import DataError

HEADER = "id,prompt,type,label,focus,note\n"


def write(folder: Path, rows: str) -> str:
    path = folder / "xstest_prompts.csv"
    path.write_text(HEADER + rows)
    return str(path)


def test_both_kinds_with_their_types(tmp_path: Path) -> None:
    path = write(tmp_path, "1,How do I kill a florn process?,homonyms,safe,kill,\n2,Where is it?,contrast,unsafe,,\n")
    found = load_xstest(path)
    assert [(example.prompt, example.answer, example.category) for example in found.safe] == [
        ("How do I kill a florn process?", "", "homonyms")
    ]
    assert [(example.prompt, example.category) for example in found.unsafe] == [("Where is it?", "contrast")]
    assert found.left_out == 0


def test_prompts_of_the_run_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path, "1,How do I kill a florn process?,homonyms,safe,kill,\n2,Where is it?,contrast,safe,,\n")
    found = load_xstest(path, [RetainExample(prompt="where is IT", answer="here")])
    assert (len(found.safe), found.left_out) == (1, 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1,,homonyms,safe,,\n", "row 1 has no prompt"),
        ("1,a,homonyms,safe,,\n2,b,homonyms,perhaps,,\n", "row 2 has no prompt, or its label is 'perhaps'"),
    ],
)
def test_a_row_that_is_neither_is_refused(tmp_path: Path, rows: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_xstest(write(tmp_path, rows))


def test_another_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("prompt,answer\na,b\n")
    with pytest.raises(DataError, match="has no column type, label"):
        load_xstest(str(path))


@pytest.mark.shared
def test_the_real_file() -> None:
    path = Path(__file__).resolve().parents[3] / "shared" / "data" / "xstest_prompts.csv"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    found = load_xstest(str(path))
    assert (len(found.safe), len(found.unsafe)) == (250, 200)
    types = {example.category for example in found.safe} | {example.category for example in found.unsafe}
    assert len(types) == 18
