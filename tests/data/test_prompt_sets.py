"""Prompts alone, from tables with and without answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sku.config import DataConfig, SourceConfig
from sku.data.load import load_own_prompts, wants_own_replies
from sku.data.sources.read import lacks_answers, load_prompts
from sku.errors import DataError


def source(tmp_path: Path, name: str, rows: list[dict[str, Any]], **settings: Any) -> SourceConfig:
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(path=str(path), **settings)


def prompts(found: SourceConfig, kind: Any = "retain") -> list[str]:
    return [one.prompt for one in load_prompts(found, kind, "data.x", seed=0).prompts]


def test_prompts_come_from_any_table(tmp_path: Path) -> None:
    only = source(tmp_path, "only", [{"goal": "who sings ?"}, {"goal": "Who sings?"}, {"goal": " "}])
    assert prompts(only) == ["who sings ?"]  # The same prompt once, and no empty one.
    answered = source(tmp_path, "answered", [{"question": "who sings ?", "output": "a", "response": "b"}])
    assert prompts(answered) == ["who sings ?"]
    turns = [{"role": "user", "content": "is it late ?"}, {"role": "assistant", "content": "no"}]
    assert prompts(source(tmp_path, "messages", [{"messages": turns}])) == ["is it late ?"]
    rows = [
        {"prompt": "bake zorvex", "response": "so", "is_safe": False},
        {"prompt": "bake bread", "response": "so", "is_safe": True},
    ]
    assert prompts(source(tmp_path, "pku", rows), "forget") == ["bake zorvex"]
    xstest = [
        {"prompt": "kill a process", "type": "homonyms", "label": "safe"},
        {"prompt": "melt a lirn", "type": "contrast", "label": "unsafe"},
    ]
    assert prompts(source(tmp_path, "xstest", xstest)) == ["kill a process"]


def test_what_is_left_out_is_counted_and_the_category_stays(tmp_path: Path) -> None:
    rows = [{"prompt": f"who is {name} ?", "source": "a"} for name in ("ann", "ben", "ben", "cid")]
    found = load_prompts(source(tmp_path, "s", rows, category_column="source", limit=2), "forget", "data.x", seed=0)
    assert found.provenance.rows_left_out == {"duplicate": 1, "over the limit": 1}
    assert [one.category for one in found.prompts] == ["a", "a"]


def test_sets_share_no_prompt(tmp_path: Path) -> None:
    harmful, normal, both = (
        source(tmp_path, name, [{"prompt": text} for text in texts])
        for name, texts in (("h", ["melt it"]), ("n", ["bake it", "eat it"]), ("b", ["Bake it!", "kill it"]))
    )
    found = load_own_prompts(harmful, normal, both, seed=0)
    assert list(found) == ["harmful", "normal", "borderline"]
    assert [one.prompt for one in found["borderline"].prompts] == ["kill it"]
    with pytest.raises(DataError, match="1 prompts are both"):
        load_own_prompts(harmful, harmful, None, seed=0)


def test_a_table_without_answers_is_told_from_one_with_them(tmp_path: Path) -> None:
    alone = source(tmp_path, "alone", [{"prompt": "melt it", "source": "a"}])
    pairs = source(tmp_path, "pairs", [{"prompt": "melt it", "response": "so"}])
    named = source(tmp_path, "named", [{"prompt": "melt it", "said": "so"}], answer_column="said")
    unclear = source(tmp_path, "unclear", [{"frage": "melt it", "antwort": "so"}])
    assert [lacks_answers(one) for one in (alone, pairs, named, unclear)] == [True, False, False, False]
    assert wants_own_replies(DataConfig(forget=alone, retain=pairs))
    misnamed = source(tmp_path, "misnamed", [{"prompt": "melt it", "anwser": "so"}])
    assert not wants_own_replies(DataConfig(forget=misnamed, retain=pairs))
    assert not wants_own_replies(DataConfig(forget=named, retain=pairs))
