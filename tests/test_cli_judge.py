"""``sku judge export``, ``sku judge again`` and ``--judge``, on evaluations of the embedded world."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from conftest import Command
from sku.cli.options import resolve_recipe
from sku.config import EvaluateConfig
from sku.data.load import load_forget_retain
from sku.evaluate.run import evaluate
from sku.models import load_model


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation") / "base"
    config = EvaluateConfig(prompts=4, retain_prompts=2, max_new_tokens=24, samples=0, prefill_tokens=(5,))
    base = load_model("embedded")
    evaluate(base.model, base.tokenizer, load_forget_retain(), config=config, base_model=base.model, output_dir=folder)
    return folder


def label_all(path: Path, label: str) -> None:
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows([{**row, "label": label} for row in rows])


def test_labels_go_out_and_come_back(command: Command, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels.csv"
    code, printed, messages = command("judge", "export", finished, "--out", out)
    assert (code, printed.split()[:2]) == (0, ["16", "replies"])
    assert "may be harmful: keep it to yourself" in messages
    label_all(out, "safe")
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    code, printed, _ = command("judge", "again", finished, "--judge", out, "--json")
    found = json.loads(printed)
    assert code == 0
    assert found["before"]["replies"]["forget_test"]["harmful"]["count"] == 4
    assert found["after"]["replies"]["forget_test"]["harmful"]["count"] == 0
    assert found["after"]["prefill"]["forget_test"]["5"]["harmful"]["count"] == 0
    assert found["after"]["judge"]["name"] == "labels"
    assert found["agreement"] == {"kappa": None, "disputed": 16, "judged_by_both": 16}
    code, printed, _ = command("judge", "again", finished, "--judge", out)
    lines = [line.split() for line in printed.splitlines()]
    assert ["forget_test", "reply", "harmful", "100.0", "%", "0.0", "%", "4"] in lines
    assert "labels: 16 labels, 0 rows without one" in printed
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "offending"),
    [
        (["again", "{folder}", "--judge", "nobody"], "nobody"),
        (["again", "{folder}", "--judge", "chat-rubric"], "base_url"),
        (["again", "{folder}/none", "--judge", "refusal_rules"], "none"),
        (["export", "{folder}", "--out", "x.csv", "--split", "retain_test"], "retain_test"),
        (["calibrate", "refusal_rules", "x.csv", "--column", "answer=x"], "--column answer"),
        (["calibrate", "refusal_rules", "x.csv", "--every", "odd"], "--every"),
        (["train", "x.csv", "--out", "x", "--where", "x"], "--where"),
    ],
)
def test_a_mistake_is_one_line(command: Command, finished: Path, arguments: list[str], offending: str) -> None:
    code, printed, messages = command("judge", *(part.replace("{folder}", str(finished)) for part in arguments))
    assert (code, printed, messages.count("\n")) == (2, "", 1)
    assert offending in messages


def test_the_judge_of_a_command_takes_the_place_of_the_recipes(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\nmodel: {path: embedded}\ndata: {forget: {path: embedded}, retain: {path: embedded}}\n"
        "evaluate: {judge: old, judge_settings: {threshold: 0.3}}\n",
        encoding="utf-8",
    )
    changed = resolve_recipe(str(file), judge="new", overrides=["evaluate.judge_settings.model=m"]).evaluate
    assert (changed.judge, changed.judge_settings) == ("new", {"model": "m"})
