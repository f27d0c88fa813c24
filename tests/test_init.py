"""``sku init``: a recipe with comments that runs as ``sku run MODEL --forget PROMPTS`` does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import Command
from sku.config import load_recipe


def test_the_recipe_is_that_of_the_run(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.csv").write_text("prompt\nhow a ?\nhow b ?\n")
    (tmp_path / "model").mkdir()
    code, out, err = command(
        "init", "prompts.csv", "--model", "model", "--judge", "refusal_rules", "--out", "mine.yaml"
    )
    assert code == 0, err
    text = (tmp_path / "mine.yaml").read_text()
    assert text.startswith("# sku run mine.yaml --out runs/model\n#\n# Settings of recipe llama-3.1-8b: ")
    assert "# Share of its refusals that begin after a harmful beginning" in text, "comments stay"
    assert "# Refusal rules, an upper bound" not in text, "those of what was replaced don't"
    written, made = load_recipe("mine.yaml"), load_recipe("llama-3.1-8b")
    assert (written.model.path, written.data.forget.path, written.data.forget.split) == ("model", "prompts.csv", None)
    assert (written.name, written.evaluate.judge) == ("model", "refusal_rules")
    assert (written.acquire, written.negate, written.data.retain) == (made.acquire, made.negate, made.data.retain)
    assert "next      sku run mine.yaml --dry-run" in out


def test_a_model_with_a_recipe_of_its_own(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command("init", "p.csv", "--model", "facebook/opt-2.7b", "--retain", "n.csv", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["recipe"] == "recipe.yaml"
    assert (told["settings"]["name"], told["settings"]["data"]["retain"]["path"]) == ("opt-2.7b-paper", "n.csv")
    code, out, err = command("init", "p.csv", "--model", "facebook/opt-2.7b")
    assert (code, err) == (2, "error: recipe.yaml is there already: name another file with --out\n")
