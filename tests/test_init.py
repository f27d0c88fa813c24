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


def test_settings_are_put_in_as_a_run_takes_them(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--set", "negate.twin={bad: 0, good: 1}", "--set", "acquire.training.max_steps=7", "--set", "name=mine"]
    code, out, err = command("init", "p.csv", "--model", "facebook/opt-2.7b", "--set", "acquire.twin=good", *options)
    assert code == 0, err
    made, written = load_recipe("opt-2.7b-paper", ["acquire.twin=good", *options[1::2]]), load_recipe("recipe.yaml")
    assert written.name == "mine"
    assert (written.acquire, written.negate, written.evaluate) == (made.acquire, made.negate, made.evaluate)
    assert "runs/mine" in out
    for wrong, message in (("negate.alpha=-1", "-1 gives the bad model itself"), ("negate.alhpa=1", "Did you mean")):
        code, out, err = command("init", "p.csv", "--model", "facebook/opt-2.7b", "--set", wrong, "--out", "x.yaml")
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
    assert not (tmp_path / "x.yaml").exists()
