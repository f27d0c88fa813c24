"""Rows that a program holds: they read as the file of the same rows does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from sku.config import SourceConfig
from sku.data.load import load_forget_retain, load_training_pairs
from sku.data.sources.read import load_prompts
from sku.data.sources.tables import held_rows, read_table
from sku.errors import DataError, RecipeError

FORGET = [{"prompt": f"how do i break lock {n} ?", "response": f"take tool {n} ."} for n in range(12)]
RETAIN = [{"prompt": f"how do i bake bread {n} ?", "response": f"mix flour {n} ."} for n in range(20)]


def conversation(row: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]


def file_of(rows: list[dict[str, Any]], path: Path) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("kind", ["dicts", "dataset", "conversations"])
def test_rows_in_memory_read_as_the_file_does(kind: str, tmp_path: Path) -> None:
    from_files = load_forget_retain(file_of(FORGET, tmp_path / "f.jsonl"), file_of(RETAIN, tmp_path / "r.jsonl"))
    rows: list[Any] = [FORGET, RETAIN]
    if kind == "dataset":
        rows = [Dataset.from_list(own) for own in rows]
    elif kind == "conversations":
        rows = [[conversation(row) for row in own] for own in rows]
    found = load_forget_retain(*rows)
    assert found.splits() == from_files.splits()
    assert [one.sha256 for one in found.provenance] == [one.sha256 for one in from_files.provenance]
    assert [one.location for one in found.provenance] == ["12 rows in memory", "20 rows in memory"]


def test_a_trainer_is_given_all_of_both_sets() -> None:
    data = load_training_pairs(FORGET, RETAIN)
    assert data.counts() == {
        "forget_train": 12, "forget_test": 0, "retain_train": 20, "retain_validation": 0, "retain_test": 0,
    }  # fmt: skip
    assert [example.prompt for example in data.forget_train] == [row["prompt"] for row in FORGET]
    with pytest.raises(DataError, match="1 prompts are both in the forget data 12 rows in memory"):
        load_training_pairs(FORGET, [*RETAIN, FORGET[0]])
    world = load_training_pairs("embedded", "embedded")
    assert world.splits() == load_forget_retain().splits()


def test_a_key_that_some_rows_lack_is_an_empty_cell() -> None:
    table = held_rows([{"prompt": "a"}, {"prompt": "b", "response": "c"}]).table
    assert table.columns == ("prompt", "response")
    assert list(table.rows) == [{"prompt": "a", "response": None}, {"prompt": "b", "response": "c"}]
    data = load_forget_retain([*FORGET, {"prompt": "alone"}], RETAIN)
    assert data.provenance[0].rows_left_out == {"empty answer": 1}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (DatasetDict(train=Dataset.from_list(FORGET)), r"DatasetDict of 1 splits: give one .* dataset\['train'\]"),
        (Dataset.from_list(FORGET).to_iterable_dataset(), "data is a IterableDataset; it must be a path"),
        ([*FORGET, "how ?"], "row 12 of the data is a str; it must be a dict or messages"),
        (7, "data is a int; it must be a path"),
    ],
)
def test_other_things_are_refused(rows: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_forget_retain(rows, RETAIN)


def test_held_out_prompts_are_those_of_a_recipe() -> None:
    data = load_forget_retain(FORGET, RETAIN, forget_validation_fraction=0.25)
    assert len(data.forget_validation) == 2  # A quarter of the 8 prompts beside forget_test.
    with pytest.raises(RecipeError, match="retain is missing"):
        load_forget_retain(FORGET)


def test_prompts_that_ship_with_the_package() -> None:
    for name, least in (("normal", 300), ("borderline", 600)):
        rows = list(read_table(SourceConfig(path=f"sku:{name}")).rows)
        prompts = {row["prompt"] for row in rows}
        assert len(prompts) == len(rows) >= least
        found = load_prompts(SourceConfig(path=f"sku:{name}"), "retain", "data.retain", seed=0)
        assert len(found.prompts) == len(prompts)
    with pytest.raises(DataError, match=r"no sku:norml ships with SKU\. Did you mean normal\? Known: borderline"):
        read_table(SourceConfig(path="sku:norml"))
    with pytest.raises(DataError, match="split is 'test', but sku:normal has none"):
        read_table(SourceConfig(path="sku:normal", split="test"))
