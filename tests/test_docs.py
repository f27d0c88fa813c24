"""The pages say what is so: commands, options, keys, names and links exist; what is marked ``<!-- run -->`` runs."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from markdown_it import MarkdownIt
from transformers import TrainingArguments

import sku
from sku.__main__ import app
from sku.config import AcquireConfig, NegateConfig, Recipe, WeightsConfig, load_recipe, recipe_names
from sku.training.config import UnlearningConfig

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", *sorted(path for path in DOCS.rglob("*.md") if DOCS / "parts" not in path.parents))
SHELLS = {"bash", "sh", "shell", "console"}
RUN = "<!-- run -->"
COMMAND: Any = typer.main.get_command(app)


@dataclass(frozen=True)
class Block:
    """A block of code on a page."""

    page: Path
    line: int
    language: str
    """``indented`` for one without a fence."""
    text: str
    marked: bool
    """Whether it is to run."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    before = ""
    for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            language = token.info.split()[0] if token.info.strip() else ""
            yield Block(
                page=page,
                line=token.map[0] + 1,
                language=language if token.type == "fence" else "indented",
                text=token.content,
                marked=before.strip() == RUN,
            )
        before = token.content if token.type == "html_block" else ""


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]


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


COMMANDS = [
    pytest.param(words, id=f"{block} sku {' '.join(words)}")
    for block in BLOCKS
    if block.language in SHELLS | {"indented"}
    for words in sku_commands(block)
]


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


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_line_is_one(words: list[str]) -> None:
    """Commands, options, numbers of arguments and types; and every recipe key that ``--set`` names."""
    command, given = parsed(words)
    if command in ("sku run", "sku acquire", "sku evaluate", "sku compare", "sku sweep"):
        known = given.get("recipe") in recipe_names()
        load_recipe(given["recipe"] if known else "smollm2-135m-twins", given.get("overrides") or [])


def imported_names(code: str) -> Iterator[tuple[str, str | None]]:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_compiles_and_imports_what_exists(block: Block) -> None:
    compile(block.text, str(block), "exec")
    for module, name in imported_names(block.text):
        if module.split(".")[0] == "sku":
            found = importlib.import_module(module)
            assert name is None or hasattr(found, name), f"{module} has no {name}"


@pytest.mark.integration
@pytest.mark.parametrize("block", [block for block in BLOCKS if block.marked], ids=str)
def test_what_is_marked_runs(block: Block, tmp_path: Path) -> None:
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


def test_the_page_of_commands_is_up_to_date() -> None:
    """Whatever the terminal looks like."""
    terminal = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "COLUMNS": "40",
        "FORCE_COLOR": "1",
        "TERM": "xterm-256color",
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "cli_reference.py"), "--check"],
        capture_output=True, text=True, check=False, env=terminal,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_links_to_files_lead_somewhere() -> None:
    """``make docs`` checks the rest: anchors, and that each page has its place."""
    dead = []
    for page in PAGES:
        for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
            for child in token.children or ():
                target = str(child.attrGet("href") or child.attrGet("src") or "").partition("#")[0]
                if target and "://" not in target and not (page.parent / target).exists():
                    dead.append(f"{page.relative_to(ROOT)}: {target}")
    assert dead == []


PAPER_MAP = (DOCS / "paper_map.md").read_text(encoding="utf-8")
CODE = set(re.findall(r"`([^`\n]+)`", PAPER_MAP))


def own_fields() -> set[str]:
    """Settings of training that are not transformers' own."""
    theirs = {item.name for item in dataclasses.fields(TrainingArguments)}
    return {item.name for item in dataclasses.fields(UnlearningConfig)} - theirs


def public_names_of(part: str) -> set[str]:
    """Names that ``sku`` lists and that live in one of its parts."""
    stub = ast.parse(Path(sku.__file__).with_name("__init__.pyi").read_text(encoding="utf-8"))
    return {
        alias.asname or alias.name
        for line in stub.body
        if isinstance(line, ast.ImportFrom) and line.module is not None and line.module.split(".")[0] == part
        for alias in line.names
    }


def test_every_public_name_of_both_stages_is_in_the_paper_map() -> None:
    names = public_names_of("acquire") | public_names_of("negate")
    assert {"SkuTrainer", "TaskVector", "negate_folders"} <= names
    assert names - CODE == set()


def test_every_setting_of_both_stages_is_in_the_paper_map() -> None:
    keys = {
        *(f"acquire.{item.name}" for item in dataclasses.fields(AcquireConfig)),
        *(f"acquire.weights.{item.name}" for item in dataclasses.fields(WeightsConfig)),
        *(f"negate.{item.name}" for item in dataclasses.fields(NegateConfig)),
    }
    assert keys - CODE == set()


def test_every_file_of_the_paper_map_exists() -> None:
    files = {name for name in CODE if re.fullmatch(r"[\w/]+\.py", name)}
    assert len(files) > 10
    assert {name for name in files if not (ROOT / "src" / "sku" / name).is_file()} == set()


def has_key(content: Any, names: list[str]) -> bool:
    if not names:
        return True
    return isinstance(content, dict) and names[0] in content and has_key(content[names[0]], names[1:])


def test_every_recipe_key_of_the_paper_map_exists() -> None:
    parts = {item.name for item in dataclasses.fields(Recipe)}
    keys = {name for name in CODE if re.fullmatch(r"[a-z_.]+", name) and name.split(".")[0] in parts - {"name"}}
    recipe = load_recipe("embedded").to_dict()
    training = {f"acquire.training.{name}" for name in own_fields()}
    assert len(keys) > 20
    assert {key for key in keys - training if not has_key(recipe, key.split("."))} == set()
