"""``sku init``: a recipe with comments that runs as ``sku run MODEL --forget PROMPTS`` does; and ``sku doctor``."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import Command
from methods.test_from_file import MINIMAL
from sku.config import load_recipe, recipe_from_dict, recipe_names
from sku.methods.run import resolve_method


def test_the_recipe_is_that_of_the_run(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.csv").write_text("prompt\nhow a ?\nhow b ?\n")
    (tmp_path / "model").mkdir()
    code, _, err = command("init", "prompts.csv", "--model", "model", "--judge", "refusal_rules", "--out", "mine.yaml")
    assert code == 0, err
    text = (tmp_path / "mine.yaml").read_text()
    assert "# Share of its refusals that begin after a harmful beginning" in text, "comments stay"
    assert "# Refusal rules, an upper bound" not in text, "those of what was replaced don't"
    written, made = load_recipe("mine.yaml"), load_recipe("llama-3.1-8b")
    assert (written.model.path, written.data.forget.path, written.data.forget.split) == ("model", "prompts.csv", None)
    assert (written.name, written.evaluate.judge) == ("model", "refusal_rules")
    assert (written.acquire, written.negate, written.data.retain) == (made.acquire, made.negate, made.data.retain)


def test_settings_are_put_in_as_a_run_takes_them(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into the recipe that is made for the model; nothing is replaced, and nothing wrong is written."""
    monkeypatch.chdir(tmp_path)
    options = ["--set", "negate.twin={bad: 0, good: 1}", "--set", "acquire.training.max_steps=7", "--set", "name=mine"]
    code, out, err = command("init", "p.csv", "--model", "facebook/opt-2.7b", "--set", "acquire.twin=good", *options)
    assert code == 0, err
    made, written = load_recipe("opt-2.7b-paper", ["acquire.twin=good", *options[1::2]]), load_recipe("recipe.yaml")
    assert written.name == "mine"
    assert (written.acquire, written.negate, written.evaluate) == (made.acquire, made.negate, made.evaluate)
    assert "runs/mine" in out
    for more in ("--set negate.alpha=-1 --out x.yaml", "--set negate.alhpa=1 --out x.yaml", ""):
        code, _, err = command("init", "p.csv", "--model", "facebook/opt-2.7b", *more.split())
        assert (code, err.count("error: ")) == (2, 1)
    assert not (tmp_path / "x.yaml").exists()


def test_what_ships_is_listed_and_shown(command: Command) -> None:
    told = json.loads(command("init", "--json")[1])
    assert [recipe["name"] for recipe in told["recipes"]] == list(recipe_names())
    assert {"sku", "npo"} <= {method["name"] for method in told["methods"]}
    printed = command("init")[1]
    assert all(entry["name"] in printed for kind in told.values() for entry in kind)
    for name in recipe_names():
        assert recipe_from_dict(json.loads(command("init", name, "--json")[1]), name) == load_recipe(name)
    assert "methods.npo.settings.beta=0.1" in command("init", "npo")[1]
    assert Path(command("init", "fsdp2")[1].strip()).name == "fsdp2.yaml"
    for words in (["nqo"], ["--model", "m"], ["npo", "--set", "seed=1"]):
        code, out, err = command("init", *words)
        assert (code, out, err.count("\n")) == (2, "", 1)


def test_a_file_of_ones_own_prints_keys_that_a_recipe_takes(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "mine.py"
    made = "MINE = Method(name='mine', title='Mine', paper_url='-', settings=Settings, objective=objective)\n"
    path.write_text(MINIMAL + made, encoding="utf-8")
    code, out, _ = command("init", path)
    assert code == 0
    *_, method, setting = out.splitlines()
    assert setting == "methods.mine.settings.beta=1.0"
    recipe = load_recipe("embedded-paper", [method, setting.replace("1.0", "0.5")])
    assert resolve_method(recipe).settings.beta == 0.5


def test_the_doctor(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now: dict[str, Any] = {}

    def pretend(name: str) -> str:
        if name == "peft" and now["peft"] is None:
            raise metadata.PackageNotFoundError(name)
        return str(now["peft"]) if name == "peft" else "1.0.0"

    monkeypatch.setattr(metadata, "requires", lambda name: ["peft<1,>=0.19", "gguf>=2; extra == 'gguf'", "rich"])
    monkeypatch.setattr(metadata, "version", pretend)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=now["free"]))
    monkeypatch.setattr("sku.model_files.out_of_reach", lambda: now["hub"])
    for changed, wrong in (
        ({}, {}),
        ({"peft": None}, {"peft": "problem"}),
        ({"peft": "1.0.0"}, {"peft": "problem"}),
        ({"free": 5 * 2**30}, {"disk": "warning"}),
        ({"free": 10}, {"disk": "problem"}),
        ({"hub": "out of reach"}, {"hub": "warning"}),
    ):
        now = {"peft": "0.21.2", "free": 2**40, "hub": None, **changed}
        code, out, _ = command("doctor", "--out", tmp_path / "runs", "--json")
        told = json.loads(out)
        found = {check["name"]: check["status"] for check in told["checks"]}
        assert {name: status for name, status in found.items() if status != "ok"} == {"gguf": "warning", **wrong}
        assert told["ready"] == (code == 0) == ("problem" not in wrong.values())
    assert not (tmp_path / "runs").exists()
