"""Rows survive the disk; a broken file is named with its line."""

from __future__ import annotations

import dataclasses
import errno
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from sku.config import plain_data
from sku.errors import EvaluationError, OutputError
from sku.evaluate.record_files import (
    create_private_folder,
    from_plain,
    header_hash,
    read_generations,
    read_if_same,
    read_rows,
    write_rows,
)
from sku.evaluate.records import ExampleLoss, FluencyRecord, GenerationRecord
from sku.storage import write_private_text

from .conftest import RecordMaker

HEADER = {"model": {"name": "m"}, "seed": 0}


@pytest.fixture
def records(make_record: RecordMaker) -> list[GenerationRecord]:
    return [
        make_record("line one\nline two \u2028 \x85 end", id="a"),
        make_record("蜂蜜 \ud800", id="b", category="food", kind="prefill", prefill="take", finished=False),
        make_record("", id="c", split="retain_test", num_tokens=0),
    ]


def test_round_trip(tmp_path: Path, records: list[GenerationRecord]) -> None:
    path = tmp_path / "generations.jsonl"
    write_rows(path, HEADER, records)
    assert read_generations(path) == (HEADER, records)
    assert len(path.read_bytes().split(b"\n")) == 1 + len(records) + 1
    assert json.loads(path.read_bytes().split(b"\n")[0]) == {"schema_version": 5, **HEADER, "rows": 3}


@pytest.mark.parametrize(
    "row",
    [
        ExampleLoss(id="x", split="forget_test", nll=2.5, tokens=3),
        FluencyRecord(id="x", nll=1.0, tokens=2, shuffled_nlls=(3.0, 4.5)),
    ],
)
def test_other_rows_round_trip(tmp_path: Path, row: ExampleLoss | FluencyRecord) -> None:
    write_rows(tmp_path / "rows.jsonl", {}, [row])
    assert read_rows(tmp_path / "rows.jsonl", type(row)) == ({}, [row])


def test_files_and_folders_are_private(tmp_path: Path, records: list[GenerationRecord]) -> None:
    folder = tmp_path / "out"
    create_private_folder(folder)
    write_rows(folder / "generations.jsonl", HEADER, records)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "generations.jsonl").stat().st_mode) == 0o600
    assert [entry.name for entry in folder.iterdir()] == ["generations.jsonl"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "file"
    write_private_text(path, "old")
    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OutputError, match="the disk is full: .*file was not written"):
        write_private_text(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_a_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't be made"):
        create_private_folder(tmp_path / "file")
    with pytest.raises(OutputError, match="can't be written"):
        write_private_text(tmp_path / "missing" / "x", "text")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="surrogatepass").split("\n")


@pytest.mark.parametrize(
    ("line", "content", "message"),
    [
        (3, '{"id": "b", ', r"line 3 is not JSON"),
        (3, "[1, 2]", r"line 3 does not hold keys and values"),
        (3, '{"id": "b"}', r"line 3: it has missing or unknown fields category"),
        (1, '{"schema_version": 99, "rows": 3}', r"line 1 has schema version 99, this SKU reads 5"),
        (1, '{"schema_version": 5, "rows": 4}', r"holds 3 rows, its header says 4"),
    ],
)
def test_a_broken_line_is_named(
    tmp_path: Path, records: list[GenerationRecord], line: int, content: str, message: str
) -> None:
    path = tmp_path / "generations.jsonl"
    write_rows(path, HEADER, records)
    lines = _lines(path)
    lines[line - 1] = content
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    with pytest.raises(EvaluationError, match=message):
        read_generations(path)


@pytest.mark.parametrize(
    ("field", "value"), [("split", "retain_train"), ("num_tokens", "3"), ("finished", 1), ("category", 7)]
)
def test_a_field_of_the_wrong_type_is_named(
    tmp_path: Path, records: list[GenerationRecord], field: str, value: object
) -> None:
    path = tmp_path / "generations.jsonl"
    write_rows(path, HEADER, records)
    lines = _lines(path)
    lines[1] = json.dumps({**json.loads(lines[1]), field: value})
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    with pytest.raises(EvaluationError, match=rf"line 2: {field} is of the wrong type"):
        read_generations(path)


def test_doubled_cut_and_missing_files_are_refused(tmp_path: Path, records: list[GenerationRecord]) -> None:
    path = tmp_path / "generations.jsonl"
    write_rows(path, HEADER, [records[0], records[0]])
    with pytest.raises(EvaluationError, match="line 3 repeats the id a"):
        read_generations(path)
    write_rows(path, HEADER, records)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(EvaluationError, match="line 4 breaks off"):
        read_generations(path)
    with pytest.raises(EvaluationError, match="it was removed"):
        read_generations(tmp_path / "nothing.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(EvaluationError, match=r"line 1 breaks off|schema version None"):
        read_generations(tmp_path / "empty.jsonl")


def test_only_a_finished_file_of_the_same_header_is_reused(tmp_path: Path, records: list[GenerationRecord]) -> None:
    path = tmp_path / "generations.jsonl"
    assert read_if_same(path, HEADER, GenerationRecord) is None
    write_rows(path, HEADER, records)
    assert read_if_same(path, {"seed": 0, "model": {"name": "m"}}, GenerationRecord) == records
    assert read_if_same(path, {**HEADER, "seed": 1}, GenerationRecord) is None
    path.write_bytes(path.read_bytes()[:-20])
    assert read_if_same(path, HEADER, GenerationRecord) is None


def test_the_hash_of_a_header_ignores_the_order_of_its_keys() -> None:
    assert header_hash({"a": 1, "b": (2,)}) == header_hash({"b": [2], "a": 1})
    assert header_hash({"a": 1}) != header_hash({"a": 2})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tree:
    """What from_plain can meet."""

    leaves: Mapping[int, tuple[ExampleLoss, ...]]
    kind: Literal["oak", "elm"] | None
    height: float = 1.0
    rest: Mapping[str, Any] = dataclasses.field(default_factory=dict)


LEAF = ExampleLoss(id="x", split="forget_test", nll=2.5, tokens=3)


@pytest.mark.parametrize(
    "tree",
    [Tree(leaves={3: (LEAF,), 10: ()}, kind=None, rest={"a": [1, None]}), Tree(leaves={}, kind="oak", height=2)],
)
def test_what_a_dataclass_holds_comes_back_from_json(tree: Tree) -> None:
    assert from_plain(Tree, json.loads(json.dumps(plain_data(tree))), "here") == tree


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "ash"}, "kind is of the wrong type or has an unknown value"),
        ({"height": "2"}, "height is of the wrong type"),
        ({"leaves": {"one": []}}, "leaves is of the wrong type"),
        ({"leaves": {"1": [{**dataclasses.asdict(LEAF), "tokens": True}]}}, r"leaves.1\[0\].tokens is of the wrong"),
        ({"leaves": {"1": [{"id": "x"}]}}, r"leaves.1\[0\] has missing or unknown fields nll, split, tokens"),
        ({"bark": 1}, "it has missing or unknown fields bark"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(changes: dict[str, Any], message: str) -> None:
    plain = {"leaves": {}, "kind": "elm", **changes}
    with pytest.raises(EvaluationError, match=f"^here doesn't fit its schema: {message}.*: again$"):
        from_plain(Tree, plain, "here", "again")
