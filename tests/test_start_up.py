"""What answers before torch is loaded: lists, help, and every mistake that a file's place or a key shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from conftest import Command
from methods.test_from_file import MINIMAL
from sku.config import load_recipe
from sku.methods.run import resolve_method

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
    "nope.csv": "run --model MODEL --forget nope.csv --retain RETAIN",
    "data.forget.prompt_column": "run --dry-run --model MODEL --forget GERMAN --retain RETAIN",
    "no/such/dir": "run --model no/such/dir",
    "meta-llama/": "run llama-3.1-8b",
    "someone/model": "run someone/model",
    "llama-3.1-8b?": "run llama3",
    "judges/none": "run --dry-run --set evaluate.judge=judges/none",
    "npo?": "run --set method=nop",
    "negate.alpha or acquire.lora.alpha?": "compare --set alpha=1",
    "negate.alpha": "run --set negate.alpha=banana",
    "data.forget?": "run RECIPE",
    "gone/": "data inspect --model MODEL --forget gone/x/y --retain RETAIN",
    "someone/data": "sweep --model MODEL --forget someone/data --retain RETAIN",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "model").mkdir()
    texts = {
        "model/config.json": "{}",
        "model/model.safetensors": "",
        "german.csv": "frage;antwort\nwas ?;das .\n",
        "retain.csv": "question,answer\n" + "".join(f"q {n},a\n" for n in range(9)),
        "mine.yaml": "name: x\nmodel: {path: embedded}\nforget: {path: embedded}\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    names = {"MODEL": "model", "GERMAN": "german.csv", "RETAIN": "retain.csv", "RECIPE": "mine.yaml"}
    return {name: str(folder / file) for name, file in names.items()}


def test_lists_and_mistakes_are_answered_without_torch_and_a_plan_draws_nothing(
    files: dict[str, str], tmp_path: Path
) -> None:
    wrong = [[files.get(word, word) for word in words.split()] for words in WRONG.values()]
    plan = ["run", "--dry-run", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(SCRIPT), json.dumps([*LISTS, *wrong, plan])],
        capture_output=True, text=True, check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "400"},
    )  # fmt: skip
    *found, (code, out, err, heavy) = json.loads(done.stdout)
    assert (code, bool(out)) == (0, True), err
    assert "torch" in heavy
    assert "matplotlib" not in heavy
    assert not (tmp_path / "run").exists()
    for words, (code, out, err, heavy) in zip(LISTS, found, strict=False):
        assert (code, err, heavy, bool(out)) == (0, "", [], True), words
    for named, (code, out, err, heavy) in zip(WRONG, found[len(LISTS) :], strict=True):
        assert (code, out, heavy) == (2, "", []), (named, err)
        *_, last = err.splitlines()
        assert [line for line in err.splitlines() if line.startswith("error: ")] == [last]
        assert named in last, last


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


def test_a_file_of_ones_own_prints_keys_that_a_recipe_takes(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "mine.py"
    made = "MINE = Method(name='mine', title='Mine', paper_url='-', settings=Settings, objective=objective)\n"
    path.write_text(MINIMAL + made, encoding="utf-8")
    code, out, _ = command("init", path)
    assert code == 0
    *_, method, setting = out.splitlines()
    assert setting == "methods.mine.settings.beta=1.0"
    recipe = load_recipe("embedded-paper", [method, setting.replace("1.0", "0.5")])
    assert resolve_method(recipe, tmp_path / "run").settings.beta == 0.5
