"""What answers before torch is loaded: lists, help, and every mistake that a file's place or a key shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

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
