"""Rows survive the disk, a broken file is named with its line, and a run that was cut ends as if it had not been."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sku.config import EvaluateConfig
from sku.data.examples import ForgetRetainData
from sku.errors import EvaluationError
from sku.evaluate.generation.writing import ReplyWriter
from sku.evaluate.records import (
    FLUENCY_FILE,
    GENERATIONS_FILE,
    OUTCOMES_FILE,
    PERPLEXITY_FILE,
    SIMILARITY_FILE,
    STARTS_FILE,
    ExampleLoss,
    GenerationRecord,
    PartialFile,
    ResultCache,
    create_private_folder,
    header_hash,
    read_generations,
    write_rows,
)
from sku.evaluate.run import evaluate
from sku.processes import ALONE
from sku.storage import RECORD_VERSION

from .conftest import RecordMaker

HEADER = {"model": {"name": "m"}, "seed": 0}
FILES = {
    GENERATIONS_FILE, PERPLEXITY_FILE, FLUENCY_FILE, OUTCOMES_FILE, STARTS_FILE, SIMILARITY_FILE, "evaluation.json",
}  # fmt: skip


@pytest.fixture
def records(make_record: RecordMaker) -> list[GenerationRecord]:
    return [
        make_record("line one\nline two \u2028 \x85 end", id="a"),
        make_record("蜂蜜 \ud800", id="b", category="food", kind="prefill", prefill="take", finished=False),
        make_record("", id="c", split="retain_test", num_tokens=0),
    ]


def known(path: Path, header: Mapping[str, Any]) -> list[GenerationRecord] | None:
    return ResultCache(folder=path.parent, processes=ALONE).known(path.name, header, GenerationRecord)


def test_round_trip_private_and_for_the_same_header_alone(tmp_path: Path, records: list[GenerationRecord]) -> None:
    folder = tmp_path / "out"
    create_private_folder(folder)
    path = folder / GENERATIONS_FILE
    assert known(path, HEADER) is None
    with pytest.raises(EvaluationError, match=GENERATIONS_FILE):
        read_generations(path)
    write_rows(path, HEADER, records)
    assert read_generations(path) == (HEADER, records)
    lines = path.read_bytes().split(b"\n")
    assert len(lines) == 1 + len(records) + 1
    assert json.loads(lines[0]) == {"schema_version": RECORD_VERSION, **HEADER, "rows": 3}
    assert [stat.S_IMODE(place.stat().st_mode) for place in (folder, path)] == [0o700, 0o600]
    assert [entry.name for entry in folder.iterdir()] == [GENERATIONS_FILE]
    assert known(path, {"seed": 0, "model": {"name": "m"}}) == records
    assert known(path, {**HEADER, "seed": 1}) is None
    assert header_hash({"a": 1, "b": (2,)}) == header_hash({"b": [2], "a": 1})


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
        (_line(3, lambda row: {**row, "more": 1}), "line 3.*more"),
        (_line(2, lambda row: {**row, "split": "SECRET"}), "line 2.*split"),
        (_line(4, lambda row: {**row, "id": "a"}), "line 4 .*id a"),
        (_line(1, lambda row: {**row, "schema_version": 5}), "version 5"),
        (_line(1, lambda row: {**row, "rows": 4}), "3 rows"),
        (lambda content: content[:-20], "line 4"),
        (lambda content: b"", GENERATIONS_FILE),
    ],
)
def test_damage_is_named_and_nothing_of_it_reused(
    tmp_path: Path, records: list[GenerationRecord], damage: Callable[[bytes], bytes], place: str
) -> None:
    path = tmp_path / GENERATIONS_FILE
    write_rows(path, HEADER, records)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(EvaluationError, match=place) as caught:
        read_generations(path)
    assert "SECRET" not in str(caught.value), "it may be harmful text"
    assert known(path, HEADER) is None


def test_a_partial_file_keeps_whole_rows_only(tmp_path: Path) -> None:
    rows = [ExampleLoss(id=f"r{number}", split="forget_test", nll=1.5, tokens=number) for number in range(5)]
    partial = PartialFile(tmp_path / "x.jsonl", {"model": "m"}, ExampleLoss)
    assert partial.recover() == []
    partial.append(rows[:2])
    partial.append(rows[2:3])
    assert partial.recover() == rows[:3]
    partial.path.write_text(partial.path.read_text()[:-5])
    assert partial.recover() == rows[:2]
    partial.append(rows[1:4])
    assert partial.recover() == rows[:4], "a row that was made again counts once"
    lines = partial.path.read_text().splitlines(keepends=True)
    partial.path.write_text("".join([*lines[:2], "[]\n", *lines[3:]]))
    assert partial.recover() == rows[:1]
    assert PartialFile(tmp_path / "x.jsonl", {"model": "n"}, ExampleLoss).recover() == []
    assert partial.recover() == []
    partial.path.write_bytes(b"\xff\n")
    assert partial.recover() == []
    partial.remove()
    partial.remove()
    assert not list(tmp_path.iterdir())


class StopRunError(Exception):
    """What interrupts a run here."""


@pytest.mark.integration
@pytest.mark.parametrize(("stage", "at"), [("replies", 4), ("samples", 4), ("prefill", 4)])
def test_a_failed_run_goes_on_with_the_missing_batches(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_data: ForgetRetainData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    at: int,
) -> None:
    asked: list[str] = []
    real = ReplyWriter.answer

    def counting(self: Any, requests: Any, decoding: Any) -> Any:
        asked.extend(request.id for request in requests)
        return real(self, requests, decoding)

    monkeypatch.setattr(ReplyWriter, "answer", counting)
    config = EvaluateConfig(
        prompts=4, retain_prompts=4, batch_size=4, max_new_tokens=8, samples=3,
        prefill_tokens=(3, "affirmative", "answer"),
    )  # fmt: skip

    def stop(name: str, done: int, total: int) -> None:
        if (name, done) == (stage, at):
            raise StopRunError

    def run(name: str, **options: Any) -> Any:
        # The base itself: its prefills begin with its own replies.
        settings: dict[str, Any] = {"config": config, "base_model": tiny_model, "output_dir": tmp_path / name}
        return evaluate(tiny_model, tiny_tokenizer, tiny_data, **settings, **options)

    whole = run("whole")
    assert whole.setup.starts["own"] > 0
    everything = list(asked)
    asked.clear()
    with pytest.raises(StopRunError):
        run("cut", progress=stop)
    first = list(asked)
    partial = tmp_path / "cut" / f".{GENERATIONS_FILE}.partial"
    assert stat.S_IMODE(partial.stat().st_mode) == 0o600
    saved = [json.loads(line)["id"] for line in partial.read_text().splitlines()[1:]]
    assert 0 < len(saved) <= len(first) < len(everything)
    with partial.open("a") as file:
        file.write('{"id": "torn')
    asked.clear()
    assert run("cut") == whole
    assert asked == everything[len(saved) :]
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("cut", "whole")]
    assert contents[0] == contents[1]
    assert contents[0].keys() == FILES
