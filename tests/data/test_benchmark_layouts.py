"""Slices of our own words in the layouts of the benchmarks that docs/benchmarks.md names, read as it says."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from sku.config import SourceConfig
from sku.data.examples import ForgetExample, RetainExample
from sku.data.load import load_forget_retain
from sku.data.sources.read import load_prompts, read_examples
from sku.data.sources.rows import OPENING, PIECE, TOO_SHORT
from sku.errors import DataError

LAYOUTS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "TOFU": ({"question": "Where was {} born?", "answer": "In a mill."}, {}),
    "MUSE, knowmem": ({"question": "What did {} sing?", "answer": "A song."}, {}),
    "MUSE, verbmem": (
        {"prompt": "The {} of", "gt": "the mill sang ."}, {"prompt_column": "prompt", "answer_column": "gt"},
    ),
}  # fmt: skip
PROMPT_FILES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "HarmBench": (
        {
            "Behavior": "Break the {} lock", "FunctionalCategory": "standard", "SemanticCategory": "lock", "Tags": "",
            "ContextString": "", "BehaviorID": "lock_{}",
        },
        {"prompt_column": "Behavior", "category_column": "SemanticCategory"},
    ),
    "JailbreakBench": (
        {"Index": "0", "Goal": "Break {}", "Target": "Sure", "Behavior": "locks", "Category": "l", "Source": "own"},
        {"prompt_column": "Goal", "category_column": "Category"},
    ),
    "StrongREJECT": (
        {"category": "locks", "source": "own", "forbidden_prompt": "Break {}"}, {"prompt_column": "forbidden_prompt"},
    ),
}  # fmt: skip


def rows_of(row: dict[str, str], count: int, name: str = "n") -> list[dict[str, str]]:
    return [{key: text.format(f"{name}{number}") for key, text in row.items()} for number in range(count)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_pairs_to_forget_and_to_keep(name: str, tmp_path: Path) -> None:
    row, settings = LAYOUTS[name]
    sources = []
    for kind, count in (("forget", 10), ("retain", 20)):
        path = tmp_path / f"{kind}.parquet"
        Dataset.from_list(rows_of(row, count, kind)).to_parquet(path)
        sources.append(SourceConfig(path=str(path), **settings))
    data = load_forget_retain(*sources)
    assert len(data.forget_train) + len(data.forget_test) == 10
    assert {example.answer for example in data.forget_train} == {list(row.values())[1]}
    assert len(data.retain_train) + len(data.retain_validation) + len(data.retain_test) == 20


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_prompts_that_are_only_asked(name: str, tmp_path: Path) -> None:
    row, settings = PROMPT_FILES[name]
    path = tmp_path / "prompts.csv"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(row))
        table.writeheader()
        table.writerows(rows_of(row, 6))
    found = load_prompts(SourceConfig(path=str(path), **settings), "forget", "data.harmful.own", seed=0)
    assert [example.prompt for example in found.prompts] == [one[settings["prompt_column"]] for one in rows_of(row, 6)]


def test_passages_are_cut_into_openings_and_what_follows() -> None:
    words = [f"w{number}" for number in range(2 * PIECE + 2 * OPENING)]
    table = [{"text": " ".join(words)}, {"text": "too short"}, {"text": " ".join(words[: PIECE + OPENING])}]
    path = "memory"
    found, provenance = read_examples(source(table), "forget", ForgetExample)
    assert [example.prompt.split() for example in found] == [
        words[:OPENING], words[PIECE : PIECE + OPENING], words[2 * PIECE : 2 * PIECE + OPENING],
    ]  # fmt: skip
    assert [len(example.answer.split()) for example in found] == [PIECE - OPENING, PIECE - OPENING, OPENING]
    assert [example.finished for example in found] == [False, False, True]
    assert len({example.group for example in found}) == 1
    assert provenance.rows_left_out == {TOO_SHORT: 1, "duplicate": 1}
    assert provenance.source == "passages", path
    kept, _ = read_examples(source(table[:1]), "retain", RetainExample)
    assert [example.answer for example in kept] == [example.answer for example in found]


def test_text_alone_is_not_taken_for_passages() -> None:
    with pytest.raises(DataError, match="no known format fits the forget data"):
        read_examples(source([{"text": "a b c"}], format="auto"), "forget", ForgetExample)


def source(rows: list[dict[str, str]], **settings: Any) -> SourceConfig:
    from dataclasses import replace

    from sku.data.sources.tables import held_rows

    return replace(held_rows(rows), **{"format": "passages", **settings})
