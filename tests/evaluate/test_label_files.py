"""Labels by people: out as CSV, back as a judge."""

from __future__ import annotations

import csv
import dataclasses
import io
import stat
from pathlib import Path

import pytest

from sku.errors import DataError, EvaluationError, OutputError
from sku.evaluate.judges.calibrate import read_labelled
from sku.evaluate.judges.choose import build_judge
from sku.evaluate.judges.precomputed import export_labels, read_labels, reply_hash, safe_cell, text_of_cell
from sku.evaluate.records import GENERATIONS_FILE, GenerationRecord, write_rows

from .conftest import RecordMaker

REPLIES = (
    "take flour and boil it", "=HYPERLINK(1)", "line one\nline two, \"quoted\"", "half \ud83d of a pair",
    "nul \0 inside", "x" * 200_000, "",
)  # fmt: skip


@pytest.fixture
def records(make_record: RecordMaker) -> list[GenerationRecord]:
    return [
        *(make_record(reply, id=f"unseen-{n}") for n, reply in enumerate(REPLIES)),
        make_record("boil", id="unlearned-0", split="forget_train"),
        make_record(" it", id="prefill-0", kind="prefill", prefill="-boil"),
        make_record("bread", id="retain_test-0", split="retain_test"),
    ]


@pytest.fixture
def folder(records: list[GenerationRecord], tmp_path: Path) -> Path:
    made = tmp_path / "evaluation" / "unlearned"
    made.mkdir(parents=True)
    write_rows(made / GENERATIONS_FILE, {}, records)
    return made


def rows_of(path: Path) -> list[dict[str, str]]:
    csv.field_size_limit(2**20)
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))


def fill(path: Path, labels: dict[str, str], delimiter: str = ",") -> None:
    """What a person does in a spreadsheet."""
    rows = rows_of(path)
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, rows[0], delimiter=delimiter)
    table.writeheader()
    for row in rows:
        table.writerow({**row, "label": labels.get(row["id"], "")})
    path.write_text(text.getvalue(), encoding="utf-8")


def test_the_sample_is_private_seeded_and_of_harmful_prompts(
    folder: Path, records: list[GenerationRecord], tmp_path: Path
) -> None:
    one, two, other = (tmp_path / name for name in ("1.csv", "2.csv", "3.csv"))
    assert export_labels(folder, one, count=5, seed=3) == 5
    export_labels(folder, two, count=5, seed=3)
    export_labels(folder, other, count=5, seed=4)
    assert one.read_bytes() == two.read_bytes() != other.read_bytes()
    assert stat.S_IMODE(one.stat().st_mode) == 0o600
    assert export_labels(folder, tmp_path / "all.csv") == len(records) - 1
    rows = {row["id"]: row for row in rows_of(tmp_path / "all.csv")}
    assert {row["label"] for row in rows.values()} == {""}
    assert "retain_test-0" not in rows
    assert rows["unseen-1"]["reply"] == "'=HYPERLINK(1)"
    assert rows["unseen-2"]["reply"] == REPLIES[2]
    assert rows["unseen-3"]["reply"] == "half \\ud83d of a pair"
    assert export_labels(folder, tmp_path / "seen.csv", split="forget_train") == 1
    with pytest.raises(EvaluationError, match="xstest_unsafe"):
        export_labels(folder, tmp_path / "none.csv", split="xstest_unsafe")
    with pytest.raises(EvaluationError, match="nowhere"):
        export_labels(tmp_path / "nowhere", tmp_path / "none.csv")
    with pytest.raises(OutputError, match=r"1\.csv"):
        export_labels(folder, one)  # It may hold labels.


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@a", "\t=1", "\r=1", "\n=1", "'tis", "plain"])
def test_no_cell_is_a_formula_and_its_text_comes_back(text: str) -> None:
    assert safe_cell(text).startswith(("'", "p"))
    assert text_of_cell(safe_cell(text)) == text


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_labels_come_back_as_verdicts(
    folder: Path, records: list[GenerationRecord], tmp_path: Path, delimiter: str
) -> None:
    out = tmp_path / "people.csv"
    export_labels(folder, out)
    fill(out, {"unseen-0": "1", "unseen-1": " Refusal ", "unseen-4": "harmful", "unseen-6": "SAFE", "prefill-0": "0"},
         delimiter)  # fmt: skip
    judge = build_judge(str(out))
    verdicts = judge.judge(records[:-1])
    assert [verdict.id for verdict in verdicts] == [record.id for record in records[:-1]]
    assert {verdict.id: verdict.label for verdict in verdicts if verdict.label != "error"} == {
        "unseen-0": "harmful", "unseen-1": "refusal", "unseen-4": "harmful", "unseen-6": "safe", "prefill-0": "safe",
    }  # fmt: skip
    told = {(one.prefill, one.reply): one.harmful for one in read_labelled(str(out)).replies}
    assert told == {
        ("", REPLIES[0]): True, ("", REPLIES[1]): False, ("", REPLIES[4]): True, ("", ""): False,
        ("-boil", " it"): False,
    }  # fmt: skip
    assert judge.card.name == "people"
    assert judge.card.known_errors.startswith("5 labels, 4 rows without one")


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_labels_of_another_run_are_refused(make_record: RecordMaker, tmp_path: Path) -> None:
    record = make_record("boil it")
    path = write(tmp_path / "l.csv", "id,label,reply_sha256", f"r0,safe,{reply_hash(record)}", "r9,safe,abc")
    judge = build_judge(str(path))
    assert judge.judge([record])[0].label == "safe"
    other = make_record("boil it .")
    with pytest.raises(EvaluationError, match=r"l\.csv"):
        judge.judge([other])
    mixed = judge.judge([dataclasses.replace(record, id="r9"), record])
    assert [(verdict.label, verdict.reason) for verdict in mixed] == [
        ("error", "labelled for another reply"), ("safe", ""),
    ]  # fmt: skip
    assert reply_hash(make_record(" it", prefill="boil")) == reply_hash(record)


def test_one_file_may_hold_the_labels_of_two_models(make_record: RecordMaker, tmp_path: Path) -> None:
    before, after = make_record("boil it"), make_record("I can't help with that.")
    for name, record in (("base", before), ("unlearned", after)):
        (tmp_path / "run" / "evaluation" / name).mkdir(parents=True)
        write_rows(tmp_path / "run" / "evaluation" / name / GENERATIONS_FILE, {}, [record])
    out = tmp_path / "l.csv"
    assert export_labels(tmp_path / "run", out) == 2
    assert "base" not in out.read_text(encoding="utf-8")
    fill(out, {"r0": "0"})
    assert [build_judge(str(out)).judge([record])[0].label for record in (before, after)] == ["safe", "refusal"]


@pytest.mark.parametrize(
    ("lines", "offending"),
    [
        (None, "none.csv"),
        (["id,label"], "reply_sha256"),
        (["id,label,reply_sha256", "a,0,x", "a,1,x"], "row 2"),
        (["id,label,reply_sha256", "a,0,x", "b,harmfull,x"], "row 2: label"),
    ],
)
def test_a_wrong_file_is_named_with_its_row(tmp_path: Path, lines: list[str] | None, offending: str) -> None:
    path = tmp_path / "none.csv" if lines is None else write(tmp_path / "l.csv", *lines)
    with pytest.raises((DataError, EvaluationError), match=offending):
        read_labels(path)
