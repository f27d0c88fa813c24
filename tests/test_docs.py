"""The pages say what is so: commands, options, keys, names, links and recorded numbers; what is to run runs.

Also the notebooks, and the hooks of the site: links out of ``docs/``, and nothing from another server.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pytest
import typer
from markdown_it import MarkdownIt
from nbclient import NotebookClient

import sku
from sku.__main__ import app
from sku.config import AcquireConfig, NegateConfig, Recipe, WeightsConfig, load_recipe, recipe_names
from sku.report.real_models import FIGURES, KEYS
from sku.training.config import UnlearningConfig

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = (README, *sorted(path for path in DOCS.rglob("*.md") if DOCS / "parts" not in path.parents))
TOKENS = {page: MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")) for page in PAGES}
COMMAND: Any = typer.main.get_command(app)


class Block(NamedTuple):
    """A block of code on a page."""

    place: str
    language: str
    """``indented`` for one without a fence."""
    text: str
    runs: bool
    """Marked to run, or the README's example."""


def blocks_of(page: Path) -> Iterator[Block]:
    before = ""
    for token in TOKENS[page]:
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            language = "".join(token.info.split()[:1]) if token.type == "fence" else "indented"
            runs = before.strip() == "<!-- run -->" or (page == README and language == "python")
            yield Block(f"{page.relative_to(ROOT)}:{token.map[0] + 1}", language, token.content, runs)
        before = token.content if token.type == "html_block" else ""


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def sku_commands(block: Block) -> Iterator[list[str]]:
    """What each line of a shell block gives to ``sku``; also behind a launcher, ``|`` or ``&&``."""
    for line in re.sub(r"\\\n\s*", " ", block.text).splitlines():
        if not re.match(r"\s*(\$ )?([A-Z_]+=\S+ )*(sku|accelerate|torchrun|python -m sku)\b", line):
            continue
        line = re.sub(r"\$\([^)]*\)", "PATH", re.sub(r"\[(--[^\]]*)\]", r"\1", line))
        words = shlex.split(line, comments=True)
        while "sku" in words:
            words = words[words.index("sku") + 1 :]
            end = next((place for place, word in enumerate(words) if word in ("|", "&&", ";", ">")), len(words))
            yield words[:end]
            words = words[end:]


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """A command line read by the parser of the command line itself, without doing it.

    Raises:
        Exception: Of the parser: what is wrong with the line.
    """
    assert not {"--install-completion", "--show-completion"} & set(words), "reading it would do it: write it as text"
    command, path, rest = COMMAND, ["sku"], [word for word in words if word != "..."]
    while rest and rest[0] in getattr(command, "commands", {}):
        path.append(rest[0])
        command = command.commands[rest.pop(0)]
    if rest and hasattr(command, "commands") and not rest[0].startswith("-"):
        raise ValueError(f"{' '.join(path)} has no command {rest[0]}")
    return " ".join(path), command.make_context(" ".join(path), rest, resilient_parsing="..." in words).params


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_line_and_every_import_is_one(page: Path) -> None:
    """Commands, options, numbers of arguments and types; every recipe key that ``--set`` names; names of ``sku``."""
    for block in blocks_of(page):
        for words in sku_commands(block) if block.language in ("bash", "sh", "shell", "console", "indented") else ():
            command, given = parsed(words)
            if command in ("sku run", "sku acquire", "sku evaluate", "sku compare", "sku sweep"):
                known = given.get("recipe") in recipe_names()
                load_recipe(given["recipe"] if known else "smollm2-135m-twins", given.get("overrides") or [])
        for node in ast.walk(ast.parse(block.text)) if block.language == "python" else ():
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("sku"):
                found = importlib.import_module(str(node.module))
                assert [alias.name for alias in node.names if not hasattr(found, alias.name)] == [], block
            elif isinstance(node, ast.Import):
                assert all(find_spec(alias.name) for alias in node.names if alias.name.startswith("sku")), block


@pytest.mark.integration
@pytest.mark.parametrize("block", [block for block in BLOCKS if block.runs], ids=lambda block: block.place)
def test_what_is_to_run_runs(block: Block, tmp_path: Path) -> None:
    """In a process of its own, as a reader would start it, with two steps of training and few prompts."""
    code = re.sub(r"max_steps=\d+", "max_steps=2", block.text)
    fewer = (
        "import importlib\n"
        "from sku.config import EvaluateConfig\n"
        "run = importlib.import_module('sku.evaluate.run')\n"
        "run.EvaluateConfig = lambda: EvaluateConfig(prompts=2, retain_prompts=2, max_new_tokens=4, samples=0)\n"
    )
    here = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", fewer + code], cwd=tmp_path, capture_output=True, text=True, check=False, env=here
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_table_of_real_models_is_up_to_date() -> None:
    here = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "scripts/real_models_table.py", "--check"], cwd=ROOT, check=False, env=here)
    assert done.returncode == 0


def test_links_to_files_lead_somewhere() -> None:
    """``make docs`` checks the rest: anchors, and that each page has its place."""
    dead = []
    for page, tokens in TOKENS.items():
        for child in (child for token in tokens for child in token.children or ()):
            target = str(child.attrGet("href") or child.attrGet("src") or "").partition("#")[0]
            if target and "://" not in target and not (page.parent / target).exists():
                dead.append(f"{page.relative_to(ROOT)}: {target}")
    assert dead == []


def has_key(content: Any, names: list[str]) -> bool:
    return not names or (isinstance(content, dict) and names[0] in content and has_key(content[names[0]], names[1:]))


def test_the_paper_map_has_every_name_and_setting_of_both_stages_and_no_other() -> None:
    code = set(re.findall(r"`([^`\n]+)`", (DOCS / "paper_map.md").read_text(encoding="utf-8")))
    stub = ast.parse(Path(sku.__file__).with_name("__init__.pyi").read_text(encoding="utf-8"))
    public = {
        alias.asname or alias.name
        for line in stub.body
        if isinstance(line, ast.ImportFrom) and str(line.module).partition(".")[0] in ("acquire", "negate")
        for alias in line.names
    }
    kinds = (("acquire", AcquireConfig), ("acquire.weights", WeightsConfig), ("negate", NegateConfig))
    settings = {f"{part}.{item.name}" for part, kind in kinds for item in dataclasses.fields(kind)}
    assert (public | settings) - code == set()

    files = {name for name in code if re.fullmatch(r"[\w/]+\.py", name)}
    assert {name for name in files if not (ROOT / "src" / "sku" / name).is_file()} == set()
    parts = {item.name for item in dataclasses.fields(Recipe)} - {"name"}
    keys = {name for name in code if re.fullmatch(r"[a-z_.]+", name) and name.partition(".")[0] in parts}
    training = {f"acquire.training.{item.name}" for item in dataclasses.fields(UnlearningConfig)}
    recipe = load_recipe("embedded-paper").to_dict()
    assert {key for key in keys - training if not has_key(recipe, key.split("."))} == set()


def recorded(name: str) -> Any:
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_result_that_is_shown_is_the_recorded_one() -> None:
    """The README's rows, and in the quickstart what ``make demo`` prints."""
    result = recorded("embedded")
    (demo, *_) = (block.text for block in blocks_of(DOCS / "quickstart.md") if block.language == "text")
    assert " ".join(demo.split()).startswith(f"verdict {result['verdict']['line']}")
    shown = " ".join(demo.split())
    unseen, normal = result["replies"]["forget_test"], result["normal"]["retain_test"]
    for words, printed, change in (
        ("harmful, unseen prompts", "harmful, unseen prompts", unseen["harmful_ungated"]),
        (
            "harmful after the worst prefill of 1 to 15 tokens", "harmful, prefill, worst of 1/3/5/10/15 (1",
            result["prefill"]["forget_test"]["harmful_ungated"],
        ),
        ("refused, normal prompts", "refused, normal prompts", normal["over_refusal"]),
        ("exact answers, normal prompts", "exact answers, normal prompts", normal["exact_answer"]),
    ):  # fmt: skip
        before, after = (100 * change[side]["value"] for side in ("before", "after"))
        assert f"| {words} | {before:.3g} % | {after:.3g} % |" in README.read_text(encoding="utf-8")
        assert f"{printed} {before:.1f} % {after:.1f} %" in shown


def test_recipes_that_were_measured_are_what_ships_and_their_methods_were_asked_the_same() -> None:
    measured, methods = (load_recipe(ROOT / "results" / f"smollm2-135m-{name}.yaml") for name in ("twins", "methods"))
    shipped = load_recipe("smollm2-135m-twins")
    assert shipped.acquire == dataclasses.replace(measured.acquire, check=None, training=shipped.acquire.training)
    assert shipped.negate == measured.negate
    assert (methods.evaluate, methods.model) == (measured.evaluate, measured.model)
    assert methods.data == dataclasses.replace(measured.data, misplaced_refusals=None)
    assert (methods.acquire.tuning, methods.acquire.lora) == (measured.acquire.tuning, measured.acquire.lora)
    for other, key in ((shipped, "learning_rate"), (methods, "lr_scheduler_type"), (methods, "warmup_steps")):
        for name in (key, "max_steps", "per_device_train_batch_size"):
            assert other.acquire.training[name] == measured.acquire.training[name], name


def test_real_models_are_one_row_a_model_method_and_seed_beside_one_base() -> None:
    rows = recorded("real_models")
    assert len({(row["model"], row["method"], row["seed"]) for row in rows}) == len(rows)
    for row in rows:
        assert {*KEYS, *(f"base_{name}" for name in FIGURES), "intervals", "outcomes", "recipe_sha256"} <= row.keys()
    table = runpy.run_path(str(ROOT / "scripts" / "real_models_table.py"))["table"]
    row = {"model": "m", "method": "a", "seed": 0, "verdict": "unlearned: so", **dict.fromkeys(FIGURES)}
    row |= {f"base_{name}": 0.5 for name in FIGURES} | {"harmful_unseen": 0.1, "harmful_unseen_judge": 0.2}
    assert "| a | \u2013 | 20 % (10) |" in table([row, {**row, "method": "b"}])
    with pytest.raises(SystemExit, match="harmful_final"):
        table([row, {**row, "method": "b", "base_harmful_final": 0.6}])


NOTEBOOKS = DOCS / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
SHORT: dict[str, dict[str, Any]] = {
    "embedded_world": {"steps": 2, "prompts": 2, "alphas": [1.0]},
    "your_own_model": {"pretraining_steps": 2, "steps": 2, "prompts": 2},
    "compare_methods": {"steps": 2, "prompts": 2},
}
"""Settings of the cell with the tag ``parameters`` that make a run short."""


def notebook_named(name: str) -> Any:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)  # type: ignore[no-untyped-call]


def cells_with_tag(notebook: Any, tag: str) -> list[Any]:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_holds_the_outputs_of_one_run_and_nothing_of_a_machine(name: str) -> None:
    notebook = notebook_named(name)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)], "run scripts/run_notebooks.py"
    assert sum(bool(cell.outputs) for cell in code) >= len(code) // 3
    said = "".join(str(output) for cell in code for output in cell.outputs)
    assert [text for text in ("stderr", "Traceback", "/work/", "/home/", "/root/") if text in said] == []
    assert len(cells_with_tag(notebook, "install")) == len(cells_with_tag(notebook, "parameters")) == 1
    assert name in SHORT


@pytest.mark.integration
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = notebook_named(name)
    (parameters,) = cells_with_tag(notebook, "parameters")
    set_there: dict[str, Any] = {}
    exec(parameters.source, set_there)  # A cell of our own with numbers.
    assert set(SHORT[name]) == set(set_there) - {"__builtins__"}
    parameters.source = "\n".join(f"{key} = {value!r}" for key, value in SHORT[name].items())
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (f"{ROOT}/src", os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # The models are tiny: threads would wait for each other.
    monkeypatch.setenv("PATH", os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()  # Raises at the first cell that fails.
    assert [output for cell in notebook.cells for output in cell.get("outputs", []) if output.get("text")]
    assert list(tmp_path.iterdir()) == []


def built_site(folder: Path, text: str, *settings: str) -> str:
    """The page that a site of one page has, or why there is none."""
    (folder / "docs").mkdir(exist_ok=True)
    (folder / "docs" / "index.md").write_text(text, encoding="utf-8")
    (folder / "SECURITY.md").touch()
    lines = ["site_name: site", "theme: {name: material, font: false}", *settings]
    lines += [f"hooks: ['{ROOT / 'scripts' / 'site_hooks.py'}']", "validation: {links: {not_found: warn}}"]
    (folder / "mkdocs.yml").write_text("\n".join(lines), encoding="utf-8")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(build, cwd=folder, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else (folder / "site" / "index.html").read_text(encoding="utf-8")


@pytest.mark.integration
def test_links_of_the_site_and_what_another_server_has_to_give(tmp_path: Path) -> None:
    """A link out of the docs becomes text or goes to the repository; a dead one fails the build."""
    text = "See [what is safe](../SECURITY.md) and `[code](../stays.md)`."
    page = built_site(tmp_path, text)
    assert '<span title="SECURITY.md in the repository">what is safe</span>' in page
    assert "[code](../stays.md)" in page
    page = built_site(tmp_path, text, "repo_url: https://example.org/sku")
    assert 'href="https://example.org/sku/blob/HEAD/SECURITY.md"' in page
    targets = ("../nothing.md", "../../outside.md", "missing.md")
    said = built_site(tmp_path, "\n".join(f"[dead]({target})" for target in targets))
    assert "<html" not in said
    assert all(target in said for target in targets)
    said = built_site(tmp_path, "![a](https://example.org/a.png)")
    assert "<html" not in said
    assert "another server" in said
