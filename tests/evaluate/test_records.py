"""Rows survive the disk; a broken file is named with its line."""

from __future__ import annotations

import dataclasses
import errno
import json
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from sku.errors import EvaluationError, OutputError
from sku.evaluate.records import (
    ExampleLoss,
    GenerationRecord,
    create_private_folder,
    from_plain,
    header_hash,
    read_generations,
    read_if_same,
    write_rows,
)
from sku.storage import RECORD_VERSION, write_private_text

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
    folder = tmp_path / "out"
    create_private_folder(folder)
    path = folder / "generations.jsonl"
    write_rows(path, HEADER, records)
    assert read_generations(path) == (HEADER, records)
    lines = path.read_bytes().split(b"\n")
    assert len(lines) == 1 + len(records) + 1
    assert json.loads(lines[0]) == {"schema_version": RECORD_VERSION, **HEADER, "rows": 3}
    assert [stat.S_IMODE(place.stat().st_mode) for place in (folder, path)] == [0o700, 0o600]
    assert [entry.name for entry in folder.iterdir()] == ["generations.jsonl"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "file"
    write_private_text(path, "old")
    with pytest.raises(OutputError, match="missing"):
        write_private_text(tmp_path / "missing" / "x", "text")
    with pytest.raises(OutputError, match="file"):
        create_private_folder(path)
    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OutputError, match="file"):
        write_private_text(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def _line(number: int, change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def changed(content: bytes) -> bytes:
        lines = content.decode("utf-8", "surrogatepass").split("\n")
        made = change(json.loads(lines[number - 1]))
        lines[number - 1] = made if isinstance(made, str) else json.dumps(made)
        return "\n".join(lines).encode("utf-8", "surrogatepass")

    return changed


@pytest.mark.parametrize(
    ("damage", "place"),
    [
        (_line(3, lambda row: '{"id": "b", '), "line 3"),
        (_line(3, lambda row: [1, 2]), "line 3"),
        (_line(3, lambda row: {"id": "b"}), "line 3"),
        (_line(3, lambda row: {**row, "more": 1}), "line 3.*more"),
        (_line(2, lambda row: {**row, "split": "retain_train"}), "line 2.*split"),
        (_line(2, lambda row: {**row, "kind": "other"}), "line 2.*kind"),
        (_line(2, lambda row: {**row, "category": 7}), "line 2.*category"),
        (_line(4, lambda row: {**row, "id": "a"}), "line 4 repeats the id a"),
        (_line(1, lambda row: {**row, "schema_version": 5}), "schema version 5"),
        (_line(1, lambda row: {**row, "rows": 4}), "3 rows"),
        (lambda content: content[:-20], "line 4"),
        (lambda content: b"", "generations.jsonl"),
    ],
)
def test_damage_is_named_and_nothing_of_it_reused(
    tmp_path: Path, records: list[GenerationRecord], damage: Callable[[bytes], bytes], place: str
) -> None:
    path = tmp_path / "generations.jsonl"
    write_rows(path, HEADER, records)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(EvaluationError, match=place):
        read_generations(path)
    assert read_if_same(path, HEADER, GenerationRecord) is None


def test_only_a_finished_file_of_the_same_header_is_reused(tmp_path: Path, records: list[GenerationRecord]) -> None:
    path = tmp_path / "generations.jsonl"
    assert read_if_same(path, HEADER, GenerationRecord) is None
    with pytest.raises(EvaluationError, match="generations.jsonl"):
        read_generations(path)
    write_rows(path, HEADER, records)
    assert read_if_same(path, {"seed": 0, "model": {"name": "m"}}, GenerationRecord) == records
    assert read_if_same(path, {**HEADER, "seed": 1}, GenerationRecord) is None
    assert header_hash({"a": 1, "b": (2,)}) == header_hash({"b": [2], "a": 1})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tree:
    """What from_plain can meet."""

    leaves: Mapping[int, tuple[ExampleLoss, ...]]
    kind: Literal["oak", "elm"] | None
    height: float = 1.0
    rest: Mapping[str, Any] = dataclasses.field(default_factory=dict)


LEAF = ExampleLoss(id="x", split="forget_test", nll=2.5, tokens=3)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"kind": "ash"}, "kind"),
        ({"height": "tall"}, "height"),
        ({"leaves": {"one": []}}, "leaves.one"),
        ({"leaves": {"1": [{**dataclasses.asdict(LEAF), "tokens": "many words"}]}}, r"leaves.1.0.tokens"),
        ({"leaves": {"1": [{"id": "x"}]}}, "leaves.1.0"),
        ({"bark": 1}, "bark"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place_and_not_shown(changes: dict[str, Any], place: str) -> None:
    with pytest.raises(EvaluationError, match=f"here.*{place}.*again") as caught:
        from_plain(Tree, {"leaves": {}, "kind": "elm", **changes}, "here", "again")
    assert not any(word in str(caught.value) for word in ("ash", "tall", "many words"))
