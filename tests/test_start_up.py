"""What answers before torch is loaded: lists, help, and every mistake that a file's place or a key shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

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
LISTS = [
    ["--help"],
    ["run", "--help"],
    ["negate", "-h"],
    ["--version"],
    ["init"],
    ["init", "npo"],
    ["init", "llama-3.1-8b"],
]
WRONG = {
    "nope.csv": ["run", "--model", "MODEL", "--forget", "nope.csv", "--retain", "RETAIN"],
    "--set data.forget.prompt_column=frage": [
        "run", "--dry-run", "--model", "MODEL", "--forget", "GERMAN", "--retain", "RETAIN",
    ],
    "no/such/dir can't be loaded: there is no such folder": ["run", "--model", "no/such/dir"],
    "the hub is switched off": ["run", "llama-3.1-8b"],
    "model someone/model can't be loaded": ["run", "someone/model"],
    "Did you mean llama-3.1-8b?": ["run", "llama3"],
    "there is no judge folder judges/none: make one of replies": [
        "run", "--dry-run", "--set", "evaluate.judge=judges/none",
    ],
    "Did you mean npo?": ["run", "--set", "method=nop"],
    "Did you mean negate.alpha or acquire.lora.alpha?": ["compare", "--set", "alpha=1"],
    "negate.alpha is 'banana'; it must be a number or auto": ["run", "--set", "negate.alpha=banana"],
    "forget is not a known key. Did you mean data.forget?": ["run", "RECIPE"],
    "there is no file or folder gone/": [
        "data", "inspect", "--model", "MODEL", "--forget", "gone/x/y", "--retain", "RETAIN",
    ],
    "someone/data": ["sweep", "--model", "MODEL", "--forget", "someone/data", "--retain", "RETAIN"],
}  # fmt: skip


def answers(commands: list[list[str]]) -> list[tuple[int, str, str, list[str]]]:
    """Exit code, output, messages and heavy modules of each, all in one process of their own."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(SCRIPT), json.dumps(commands)],
        capture_output=True, text=True, check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "400"},
    )  # fmt: skip
    found: list[Any] = json.loads(done.stdout)
    return [(code, out, err, heavy) for code, out, err, heavy in found]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model" / "model.safetensors").write_bytes(b"")
    (folder / "german.csv").write_text("frage;antwort\nwas ?;das .\n", encoding="utf-8")
    (folder / "retain.csv").write_text("question,answer\n" + "".join(f"q {n},a\n" for n in range(9)), encoding="utf-8")
    recipe = "name: x\nmodel: {path: embedded}\nforget: {path: embedded}\n"
    (folder / "mine.yaml").write_text(recipe, encoding="utf-8")
    names = {"MODEL": "model", "GERMAN": "german.csv", "RETAIN": "retain.csv", "RECIPE": "mine.yaml"}
    return {name: str(folder / file) for name, file in names.items()}


def test_lists_and_mistakes_are_answered_without_torch(files: dict[str, str]) -> None:
    wrong = [[files.get(word, word) for word in words] for words in WRONG.values()]
    found = answers([*LISTS, *wrong])
    for words, (code, out, err, heavy) in zip(LISTS, found, strict=False):
        assert (code, err, heavy) == (0, "", []), words
        assert out, words
    for message, (code, out, err, heavy) in zip(WRONG, found[len(LISTS) :], strict=True):
        assert (code, out) == (2, ""), (message, err)
        assert message in err
        assert [line for line in err.splitlines() if line.startswith("error: ")] == [err.splitlines()[-1]]
        assert heavy == [], message


def test_a_plan_draws_nothing(tmp_path: Path) -> None:
    ((code, out, err, heavy),) = answers([["run", "--dry-run", "--out", str(tmp_path / "run")]])
    assert code == 0, err
    assert "nothing was written" in out
    assert "torch" in heavy
    assert "matplotlib" not in heavy


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


def test_a_file_of_ones_own_prints_keys_that_a_recipe_takes(tmp_path: Path, command: Any) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import dataclass\n"
        "from sku.data.joint import RowPlan\n"
        "from sku.methods.base import Method\n"
        "from sku.training.objective import Objective\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Settings:\n    beta: float = 1.5\n"
        "def objective(settings, model):\n"
        "    return Objective(rows=RowPlan(forget=True), weights={}, losses=lambda step: {})\n"
        "MINE = Method(name='mine', title='Mine', paper_url='-', settings=Settings, objective=objective)\n",
        encoding="utf-8",
    )
    code, out, _ = command("init", path)
    assert code == 0
    *_, method, setting = out.splitlines()
    assert setting == "methods.mine.settings.beta=1.5"

    from sku.config import load_recipe
    from sku.methods.run import resolve_method

    recipe = load_recipe("embedded", [method, setting.replace("1.5", "0.5")])
    assert resolve_method(recipe, tmp_path / "run").settings.beta == 0.5
