"""What holds for every command: JSON, dry runs, how much is said, and what answers before torch is loaded."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from conftest import Command
from sku.__main__ import app
from sku.cli.init import described
from sku.cli.options import listed_methods
from sku.methods import METHODS
from sku.model_files import embedded_model_path
from sku.storage import mark_hazardous

RUN_AS_SKU = "import sys; sys.argv[0] = 'sku'\nfrom sku.__main__ import main\nmain()"

DRY_RUNS: dict[str, list[str]] = {
    "run": ["--set", "negate.alpha=1", "--out", "{out}"],
    "negate": ["embedded", "{bad}", "--out", "{out}"],
    "wipe": ["{bad}"],
}
"""Command -> arguments. ``push`` needs a finished run: tests/sharing."""


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """A marked model that differs from the embedded one."""
    folder = shutil.copytree(embedded_model_path(), tmp_path / "bad")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    weights[name] = weights[name] + torch.ones_like(weights[name]) / 64
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    mark_hazardous(folder)
    return folder


def test_every_command_has_json() -> None:
    def check(name: str, command: Any) -> None:
        children = getattr(command, "commands", {})
        assert children or any("--json" in parameter.opts for parameter in command.params), name
        for child, item in children.items():
            check(f"{name} {child}", item)

    check("sku", typer.main.get_command(app))


@pytest.mark.parametrize("arguments", ["init", "init ddp", "doctor --offline", "wipe ."])
def test_json_is_one_document_and_nothing_else(
    command: Command, arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a terminal with colours."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sku.cli.console.results._force_terminal", True)
    code, out, _ = command(*arguments.split(), "--json")
    assert code in (0, 1)  # sku doctor says 1 where the machine lacks something.
    assert isinstance(json.loads(out), dict | list)
    assert "\x1b" not in out


def test_wipe_asks_on_standard_error(command: Command, bad: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that JSON on standard output stays one document; quiet or not, what is asked about is shown."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    code, out, err = command("-q", "wipe", bad, "--json")
    assert (code, json.loads(out)) == (0, {"hazardous": [str(bad)], "removed": 1})
    assert err.startswith(f"remove    {bad}\nRemove them?")
    assert not bad.exists()


@pytest.mark.parametrize("name", DRY_RUNS)
def test_a_dry_run_writes_nothing(
    command: Command, name: str, bad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = {"{out}": tmp_path / "out", "{bad}": bad}
    words = [*name.split(), *(named.get(word, word) for word in DRY_RUNS[name]), "--dry-run"]
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, out, err = command(*words, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    if name != "wipe":
        assert found["command"] == f"sku {name}"
        assert found["wrote"] is False
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "out").exists()


def test_quiet_leaves_results_and_errors(command: Command, tmp_path: Path) -> None:
    small = ("--set", "acquire.training.max_steps=1")
    usual = command("acquire", "--out", tmp_path / "a", *small)
    quiet = command("-q", "acquire", "--out", tmp_path / "b", *small)
    assert usual[2].startswith("recipe embedded, model embedded")
    assert (quiet[0], quiet[2]) == (0, "")
    assert quiet[1] == usual[1].replace(str(tmp_path / "a"), str(tmp_path / "b"))
    failed = command("--quiet", "acquire", "--out", tmp_path / "a", *small)
    assert failed == (2, "", f"error: {tmp_path / 'a'} already exists; choose another folder or remove it first\n")


@pytest.mark.integration
def test_a_shell_completes_commands_and_names() -> None:
    """What bash is offered behind a line; torch must not be imported for it."""
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: sys.stderr.write(str('torch' in sys.modules)))\n" + RUN_AS_SKU
    )  # fmt: skip
    for line, offered in (("sku run llama-2", "llama-2-13b-paper llama-2-7b-paper"), ("sku sw", "sweep")):
        asked = {"_SKU_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **asked}
        )
        assert (done.stderr, done.stdout.split()) == ("False", offered.split())


def test_what_is_completed_is_what_there_is() -> None:
    assert json.loads(json.dumps(described(METHODS))) == listed_methods(), "run python scripts/method_list.py"


SCRIPT = """
    import contextlib, io, json, sys
    from sku.__main__ import main

    found = []
    for words in json.loads(sys.argv[1]):
        sys.argv = ["sku", *words]
        out, err, code = io.StringIO(), io.StringIO(), 0
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main()
        except SystemExit as end:
            code = end.code
        heavy = sorted({"torch", "transformers", "peft", "datasets", "matplotlib"} & set(sys.modules))
        found.append([code or 0, out.getvalue(), err.getvalue(), heavy])
    print(json.dumps(found))
"""
LISTS = [["--help"], ["negate", "-h"], ["--version"], ["init"], ["init", "npo"], ["init", "llama-3.1-8b"]]
WRONG = {
    # What the error names -> the command.
    "llama-3.1-8b?": "run llama3",
    "negate.alpha or acquire.lora.alpha?": "compare --set alpha=1",
    "negate.alpha": "run --set negate.alpha=banana",
}


def test_lists_and_wrong_keys_are_answered_without_torch_and_a_plan_draws_nothing(tmp_path: Path) -> None:
    wrong = [words.split() for words in WRONG.values()]
    subtraction = ["negate", "embedded", "embedded", "--out", str(tmp_path / "model")]
    plan = ["run", "--dry-run", "--out", str(tmp_path / "run")]
    commands = json.dumps([*LISTS, *wrong, subtraction, plan])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(SCRIPT), commands],
        capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "400"},
    )  # fmt: skip
    *found, (code, _, err, heavy), planned = json.loads(done.stdout)
    assert (code, heavy) == (2, ["torch"]), err
    code, out, err, heavy = planned
    assert (code, bool(out)) == (0, True), err
    assert "torch" in heavy
    assert "matplotlib" not in heavy
    assert not (tmp_path / "run").exists()
    for words, (code, out, err, heavy) in zip(LISTS, found, strict=False):
        assert (code, err, heavy, bool(out)) == (0, "", [], True), words
    for named, (code, out, err, heavy) in zip(WRONG, found[len(LISTS) :], strict=True):
        assert (code, out, heavy, err.count("error: ")) == (2, "", [], 1)
        assert named in err


LIGHT = {
    # What is run -> what must not be imported by then, besides torch, transformers, peft and datasets.
    "import sku, sku.config, sku.errors; sku.config.load_recipe()": ["statsmodels", "pandas"],
    "import sku.push": ["statsmodels", "pandas"],
    "from sku.evaluate.judges.choose import judge_names; judge_names()": [],
    "import sku.report.figures, sku.report.tables": [],
    "import sku.report.method_tables, sku.report.method_overview": [],
}


def test_these_modules_need_nothing_heavy() -> None:
    """One after the other in one process: the first one that imports too much is named."""
    code = (
        "import json, sys\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets'}\n"
        "for code, more in json.loads(sys.argv[1]).items():\n"
        "    exec(code)\n"
        "    found = sorted((heavy | set(more)) & set(sys.modules))\n"
        "    assert not found, (code, found)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(LIGHT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
