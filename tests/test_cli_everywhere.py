"""What holds for every command: JSON, dry runs, and how much is said in which colours."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from conftest import Command
from sku.__main__ import app
from sku.cli.console import print_cause, set_loudness
from sku.cli.init import described
from sku.cli.options import listed_methods, method_names, words_of
from sku.cli.sweep import next_commands
from sku.config import load_recipe
from sku.errors import DataError
from sku.methods import METHODS
from sku.model_files import embedded_model_path
from sku.progress import without_secret_addresses
from sku.storage import mark_hazardous

RUN_AS_SKU = "import sys; sys.argv[0] = 'sku'\nfrom sku.__main__ import main\nmain()"

WITHOUT_JSON: dict[str, str] = {}
"""Command -> why it has no --json. None so far: every command has a result that a program can read."""
DRY_RUNS: dict[str, list[str]] = {
    "run": ["--set", "negate.alpha=1", "--out", "{out}"],
    "negate": ["embedded", "{bad}", "--out", "{out}"],
    "wipe": ["{bad}"],
}
"""Command -> arguments. ``push`` needs a finished run: tests/sharing."""


def commands() -> Iterator[tuple[str, Any]]:
    """Every command that does something by itself, with its name."""

    def below(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        children = getattr(command, "commands", {})
        if not children or command.invoke_without_command:
            yield name, command
        for child, item in children.items():
            yield from below(f"{name} {child}".strip(), item)

    root: Any = typer.main.get_command(app)
    for name, command in root.commands.items():
        yield from below(name, command)


COMMANDS = dict(commands())


def options_of(command: Any) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts}


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


def test_every_command_has_json_or_a_reason() -> None:
    without = {name for name, item in COMMANDS.items() if "--json" not in options_of(item)}
    assert without == set(WITHOUT_JSON)


@pytest.mark.parametrize(
    "arguments",
    [
        "init", "init embedded", "init ddp", "init npo", "data inspect", "doctor --offline", "wipe .",
    ],
)  # fmt: skip
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


def test_a_dry_run_counts_an_adapter_apart(command: Command, tmp_path: Path) -> None:
    """Rank 8 on the two attention projections of four layers of width 128: 8 times 2 x 128 for each, in float32."""
    lora = ("--set", "acquire.tuning=lora", "--set", "acquire.lora={r: 8, target_modules: [q_proj, v_proj]}")
    sets = (*lora, "--set", "negate.alpha=1", "--set", "acquire.training.save_strategy='no'")
    code, out, err = command("run", "embedded-paper", "--dry-run", "--json", "--out", tmp_path / "out", *sets)
    assert code == 0, err
    found = json.loads(out)
    assert found["settings"]["model"].startswith("embedded, 935,040 parameters")
    trained = 4 * (4 * 2 * 8 * (128 + 128))
    assert found["disk_bytes"] == 2 * trained + 4 * 935_040, "trained, negated, and the whole model"


def test_what_comes_next_after_a_sweep(tmp_path: Path) -> None:
    """The subtraction where the bad model is there; a run with the same options where it is gone; else nothing."""
    plain = load_recipe("embedded-paper")
    transformed = load_recipe("embedded-paper", ["negate.transform=docs/examples/null_space.py"])
    folder, given = tmp_path / "my sweep", ["embedded", "--seed", "3", "--set", "evaluate.prompts=5"]
    bad = tmp_path / "bad"
    bad.mkdir()
    unlearned = tmp_path / "my sweep-unlearned"
    (command,) = next_commands(plain, folder, bad, 1.25, [str(bad)])
    assert command == ["negate", "embedded", bad, "--alpha", "1.25", "--out", unlearned]
    assert next_commands(transformed, folder, bad, 1.25, [str(bad)]) == []
    (command,) = next_commands(transformed, folder, None, 0.1, given)
    assert command == ["run", *given, "--set", "negate.alpha=0.1", "--out", tmp_path / "my sweep-run"]
    assert words_of(seed=3, overrides=["evaluate.prompts=5"]) == given[1:]
    parser: Any = typer.main.get_command(app)
    for name, *words in ([str(word) for word in command], ["negate", "embedded", str(bad), "--out", str(unlearned)]):
        parser.commands[name].make_context(name, words)


def test_quiet_leaves_results_and_errors(command: Command, tmp_path: Path) -> None:
    small = ("--set", "acquire.training.max_steps=1")
    usual = command("acquire", "--out", tmp_path / "a", *small)
    quiet = command("-q", "acquire", "--out", tmp_path / "b", *small)
    assert usual[2].startswith("recipe embedded, model embedded")
    assert (quiet[0], quiet[2]) == (0, "")
    assert quiet[1] == usual[1].replace(str(tmp_path / "a"), str(tmp_path / "b"))
    failed = command("--quiet", "acquire", "--out", tmp_path / "a", *small)
    assert failed == (2, "", f"error: {tmp_path / 'a'} already exists; choose another folder or remove it first\n")
    code, _, err = command("-q", "-v", "init")
    assert (code, err) == (2, "error: --quiet and --verbose exclude each other: leave one out\n")


@pytest.mark.integration
def test_verbose_shows_libraries_and_causes_without_secrets(tmp_path: Path) -> None:
    """In a process of its own, since it turns loggers on. No message of another package is printed."""
    forget, retain = tmp_path / "forget.jsonl", tmp_path / "retain.jsonl"
    for path in (forget, retain):
        rows = [{"prompt": f"zorvex secret {path.stem} {n}", "completion": "blue flour"} for n in range(20)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    token = "hf_" + "A1b2" * 6
    # A mistake that transformers finds: what is known to be wrong before is told before anything is imported.
    words = ["-v", "run", "--dry-run", "--forget", str(forget), "--retain", str(retain)]
    words += ["--set", "acquire.training.optim=adamax9"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN_AS_SKU, *words],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "HF_TOKEN": token},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in done.stderr
    assert re.search(r"^raised    \w+Error at \S+\.py:\d+ in \w+$", done.stderr, flags=re.MULTILINE)
    assert "transformers" in done.stderr
    assert token not in done.stderr
    assert "zorvex" not in done.stderr


def test_a_cause_is_named_by_kind_and_place_alone(capfd: pytest.CaptureFixture[str]) -> None:
    set_loudness("verbose")
    try:
        try:
            try:
                raise ValueError("a row of the data")
            except ValueError:
                raise DataError("the file can't be read") from None
        except DataError as error:
            print_cause(error)
            set_loudness("usual")
            print_cause(error)
    finally:
        set_loudness("usual")
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("raised    DataError at ")
    assert re.fullmatch(r"caused by ValueError at \S+test_cli_everywhere\.py:\d+ in test_\w+", second)


def test_lines_of_libraries_lose_tokens_and_signatures(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER_API_KEY", "long-secret-value")
    address = "https://me:pass@hub.example/file?X-Signature=abc&token=def"
    set_loudness("verbose")
    try:
        logging.getLogger("huggingface_hub.file").info("get %s with %s", address, "long-secret-value")
    finally:
        set_loudness("usual")
    logging.getLogger("huggingface_hub.file").info("unheard")
    printed = capfd.readouterr().err
    assert printed == "huggingface_hub.file: get https://***@hub.example/file?*** with ***\n"
    assert without_secret_addresses("http://a.b/c and x?y") == "http://a.b/c and x?y"


def completed(line: str) -> list[str]:
    """What bash is offered behind a line; torch must not be imported for it."""
    words = line.split(" ")
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: sys.stderr.write(str('torch' in sys.modules)))\n" + RUN_AS_SKU
    )  # fmt: skip
    asked = {"_SKU_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **asked}
    )
    assert done.stderr == "False"
    return done.stdout.split()


@pytest.mark.integration
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("sku run llama-2", ["llama-2-13b-paper", "llama-2-7b-paper"]),
        ("sku init sim", ["simnpo"]),
        ("sku sw", ["sweep"]),
    ],
)
def test_a_shell_completes_commands_and_names(line: str, offered: list[str]) -> None:
    assert completed(line) == offered


def test_what_is_completed_is_what_there_is() -> None:
    said = "run python scripts/method_list.py"
    assert json.loads(json.dumps(described(METHODS))) == listed_methods(), said
    assert method_names() == [method.name for method in METHODS]
