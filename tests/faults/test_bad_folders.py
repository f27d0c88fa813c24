"""Folders and files of results that are damaged, and names in them that would have files written elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.battery import Battery

pytestmark = pytest.mark.integration

NAME = "folders"
Maker = Callable[[Path], object]
"""Makes what is wrong at a path that does not exist."""


def run_folder(manifest: str | bytes, results: str | bytes = "{}") -> Maker:
    def make(path: Path) -> None:
        path.mkdir()
        for name, content in (("manifest.json", manifest), ("results.json", results)):
            (path / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return make


COMPLETE: dict[str, Any] = {
    "schema_version": 6,
    "status": "complete",
    "recipe": {},
    "recipe_sha256": "",
    "seconds": {},
}
FOLDERS: dict[str, Maker] = {
    "missing": lambda path: None,
    "a pipe": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path),
    "empty": Path.mkdir,
    "manifest cut off": run_folder('{"schema_version": 6, "status":'),
    "manifest of noise": run_folder(bytes(range(128, 256))),
    "manifest of brackets": run_folder("[" * 50_000),
    "manifest of another version": run_folder('{"schema_version": 99, "status": "complete"}'),
    "manifest of wrong types": run_folder(
        json.dumps({**COMPLETE, "recipe": [], "seconds": 7, "status": ["complete"]})
    ),
    "manifest alone": run_folder(json.dumps(COMPLETE)),
    "results cut off": run_folder(json.dumps(COMPLETE), '{"schema_version"'),
    "results of brackets": run_folder(json.dumps(COMPLETE), "[" * 50_000),
    "results of NaN": run_folder(json.dumps(COMPLETE), '{"base": NaN, "unlearned": Infinity}'),
    "results that lead out": run_folder(
        json.dumps({**COMPLETE, "recipe": {"name": "../../elsewhere"}}), '{"base": {"name": "../../elsewhere"}}'
    ),
    "folders for files": lambda path: (path / "manifest.json").mkdir(parents=True),
}
COMMANDS: dict[str, tuple[str, ...]] = {
    "report": ("report", "RUN", "--out", "OUT"),
    "report beside": ("report", "RUN"),
    "push": ("push", "RUN", "me/model", "--dry-run"),
    "results": ("results", "RUN"),
    "judge export": ("judge", "export", "RUN", "--out", "OUT"),
    "judge again": ("judge", "again", "RUN", "--judge", "refusal_rules"),
    "run": ("run", "--out", "RUN", "--resume"),
    "acquire": ("acquire", "--out", "RUN"),
    "sweep": ("sweep", "RUN", "--recipe", "embedded", "--out", "OUT"),
}


READERS = ("report",)
"""It reads most of a run's files and meets every fault, the other commands one of each kind."""
OF_EACH_KIND = (
    "missing", "manifest of wrong types", "results that lead out",
)  # fmt: skip


@pytest.mark.parametrize(
    ("command", "folder"),
    [
        (command, folder)
        for command in COMMANDS
        for folder in (FOLDERS if command in READERS else OF_EACH_KIND)
        if (command, folder) not in (("run", "missing"), ("acquire", "missing"))  # A new folder is no fault.
    ],
)
def test_damaged_folder_of_a_run(battery: Battery, folder: str, command: str) -> None:
    path = battery.inputs / "a run"
    FOLDERS[folder](path)
    places = {"RUN": path, "OUT": battery.out}
    battery.refuses(NAME, *(places.get(word, word) for word in COMMANDS[command]))


INDEX: dict[str, Any] = {"schema_version": 6, "rows": [], "seeds": [0], "failed": {}}
INDEXES: dict[str, str | bytes] = {
    "no JSON": "{",
    "noise": b"\xff\xfe",
    "keys missing": json.dumps({"schema_version": 6}),
    "seed of text": json.dumps({**INDEX, "seeds": ["../0"]}),
}


@pytest.mark.parametrize("content", INDEXES.values(), ids=INDEXES.keys())
def test_damaged_index_of_a_comparison(battery: Battery, content: str | bytes) -> None:
    path = battery.inputs / "comparison.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    battery.refuses(NAME, "results", battery.inputs, words="comparison.json")


LABELS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "no column"),
    "noise": (bytes(range(256)) * 10, "no column"),
    "unknown label": ("id,label,reply_sha256\na,maybe,b\n", "label is 'maybe'"),
    "a cell too long": (f"id,label,reply_sha256\na,harmful,{'x' * 17_000_000}\n", "labels.csv"),
    "probability of text": ("id,label,reply_sha256,p_harmful\na,safe,b,much\n", "p_harmful"),
    "probability NaN": ("id,label,reply_sha256,p_harmful\na,safe,b,nan\n", "p_harmful"),
}


@pytest.mark.parametrize(("content", "words"), LABELS.values(), ids=LABELS.keys())
def test_damaged_labels(battery: Battery, content: str | bytes, words: str) -> None:
    labels = battery.inputs / "labels.csv"
    labels.write_bytes(content.encode() if isinstance(content, str) else content)
    battery.refuses(NAME, "run", "--judge", labels, "--out", battery.out, words=words)


def taken_folder(path: Path) -> None:
    path.mkdir()
    (path / "mine.txt").write_text("mine")


OUTS: dict[str, Maker] = {
    "a file": lambda path: path.write_text("mine"),
    "below a file": lambda path: path.parent.write_text("mine"),
    "a link to nothing": lambda path: path.symlink_to(path.with_name("elsewhere")),
}


@pytest.mark.parametrize("make", OUTS.values(), ids=OUTS.keys())
@pytest.mark.parametrize("command", [("run",), ("negate", "embedded", "embedded"), ("acquire",)])
def test_out_that_is_taken(battery: Battery, make: Maker, command: tuple[str, ...]) -> None:
    out = battery.inputs / "below" / "out"
    if make is not OUTS["below a file"]:
        out.parent.mkdir()
    make(out)
    wrong = () if command[0] == "negate" else ("--model", "./nowhere")
    battery.refuses(NAME, *command, *wrong, "--out", out)


@pytest.mark.parametrize("out", ["", "x" * 300, "x/" * 3000, "/proc/none/out", "/dev/null/out"])
def test_out_that_can_not_be(battery: Battery, out: str) -> None:
    battery.refuses(NAME, "run", "--out", out, "--model", "./nowhere")


JUDGES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "keys and values"),
    "Python object": ("kind: !!python/object/apply:os.getpid []", "is not YAML"),
    "holds itself": ("kind: &k [*k]\n", "kind is"),
    "no kind": ("model: a\n", "kind"),
    "noise": (bytes(range(128, 256)), "can't be read"),
    "unknown key": ("kind: precomputed\npath: a.csv\npaths: b\n", "paths"),
}


@pytest.mark.parametrize(("content", "words"), JUDGES.values(), ids=JUDGES.keys())
def test_damaged_judge_file(battery: Battery, content: str | bytes, words: str) -> None:
    judge = battery.inputs / "judge.yaml"
    judge.write_bytes(content.encode() if isinstance(content, str) else content)
    battery.refuses(NAME, "run", "--judge", judge, "--out", battery.out, words=words)
