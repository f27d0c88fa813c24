"""The README's example runs, and the numbers of the demo's result are those of the recorded one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sku.__main__ import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = re.findall(
    r"^```text\n(.*?)^```$", (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8"), flags=re.M | re.DOTALL
)[0]
"""What make demo prints."""
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def example() -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    assert isinstance(code, str)
    return code


def strings(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        for value in content.values():
            yield from strings(value)
    elif isinstance(content, list):
        for value in content:
            yield from strings(value)
    elif isinstance(content, str):
        yield content


@pytest.mark.integration
def test_the_example_runs(tmp_path: Path) -> None:
    """With two steps of training and few prompts, in a process of its own, as a reader would start it."""
    code, replaced = re.subn(r"max_steps=\d+", "max_steps=2", example())
    assert replaced == 1
    fewer = (
        "import importlib\n"
        "from sku.config import EvaluateConfig\n"
        "run = importlib.import_module('sku.evaluate.run')\n"
        "run.EvaluateConfig = lambda: EvaluateConfig(prompts=4, retain_prompts=4, max_new_tokens=8)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", fewer + code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_number_of_the_result_is_recorded() -> None:
    recorded = json.loads((ROOT / "results" / "embedded.json").read_text(encoding="utf-8"))
    seconds = recorded["manifest"]["seconds"]
    words = (recorded["verdict"]["line"], *recorded["notes"], recorded["manifest"]["sweep"]["why"])
    cells = [*words, *strings(recorded["table"])]
    known = {number for cell in cells for number in NUMBER.findall(cell)}
    known |= {str(value) for value in seconds.values()} | {f"{sum(seconds.values()):.0f}"}
    # The heading says how wide intervals are; the folder's name is the time of the run.
    lines = [line for line in DEMO.splitlines()[1:] if "runs/embedded-" not in line]
    shown = NUMBER.findall("\n".join(lines))
    assert shown, "the quickstart's first text block shows the result of sku run"
    assert sorted(set(shown) - known) == []


def test_every_row_of_the_result_is_recorded_as_it_stands() -> None:
    """A number in the wrong row would pass the test above."""
    recorded = json.loads((ROOT / "results" / "embedded.json").read_text(encoding="utf-8"))
    lines = [" ".join(line.split()) for line in DEMO.splitlines()]
    for row in recorded["table"]:
        cells = (row["measure"], row["before"], row["after"], row["interval"], row["wanted"])
        expected = " ".join(" ".join(str(cell).split()) for cell in cells if cell)
        assert expected in lines


def test_the_verdict_stands_first_and_is_the_recorded_one() -> None:
    recorded = json.loads((ROOT / "results" / "embedded.json").read_text(encoding="utf-8"))
    shown = " ".join(DEMO.split())
    assert shown.startswith(f"verdict {recorded['verdict']['line']}")


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_into_the_repository_lead_somewhere(path: str) -> None:
    assert (ROOT / path).exists()


def test_every_option_that_the_readme_names_exists() -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    commands: list[list[str]] = [[], ["run"], ["acquire"], ["negate"], ["evaluate"], ["data", "inspect"], ["judge"]]
    commands += [["compare"], ["report"]]
    plain = {"COLUMNS": "300", "NO_COLOR": "1"}
    help_texts = "".join(CliRunner().invoke(app, [*command, "--help"], env=plain).output for command in commands)
    assert {option for option in named if option not in help_texts} == set()
