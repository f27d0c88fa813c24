"""The site's page of all commands (``reference/cli.md``), made of the commands themselves when the site is built.

It reads the parameters, not the help that a terminal shows, so width and colour play no part.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import typer

from sku.__main__ import app

ROOT: Any = typer.main.get_command(app)
CONTEXT = ROOT.context_class(ROOT, info_name="sku")
HEAD = """\
# Command line

Every command prints its options with `-h`. A mistake is one line on standard error and exit code 2; `Ctrl-C` is exit
code 130, SIGTERM 143. Results go to standard output, progress and messages to standard error. With `--json` the result
is one JSON document and nothing else. What holds for all commands, dry runs and completion among it:
[using the command line](../command_line.md).
"""
SHARED = 3
"""An option that so many commands have, with the same words, is described once for all."""


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """All commands below one, with the words that call them; groups come before what they hold."""
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, f"{path} {name}")


def text_of(value: object) -> str:
    """A text as a cell of a table."""
    return " ".join(inspect.cleandoc(str(value or "")).split()).replace("|", "\\|")


def usage_line(path: str, command: Any) -> str:
    """The command with its arguments and required options."""
    words = [path]
    for parameter in sorted(command.params, key=lambda item: item.param_type_name):
        if parameter.param_type_name == "argument":
            name = parameter.metavar or parameter.name.upper()
            words.append(name if parameter.required else f"[{name}]")
        elif parameter.required:
            words.append(written(parameter))
    return " ".join([*words, "COMMAND"] if hasattr(command, "commands") else [*words, "[OPTIONS]"])


def written(option: Any) -> str:
    """The option with what stands behind it, as the help writes it."""
    return str(option.get_help_record(CONTEXT)[0])


def rows_of(command: Any) -> Iterator[tuple[str, str]]:
    """Arguments and options of a command, each with what it is for and what holds where it is left out."""
    for item in sorted(command.params, key=lambda item: item.param_type_name):
        if getattr(item, "hidden", False) or item.name == "help":
            continue
        name = written(item) if item.param_type_name == "option" else item.metavar or item.name.upper()
        default = item.default
        if item.required:
            more = " **Required.**" if item.param_type_name == "option" else ""
        else:
            more = "" if default in (None, False, (), []) or callable(default) else f" Default `{default}`."
        yield f"`{text_of(name)}`", text_of(item.help) + more


def table(rows: Iterable[tuple[str, str]]) -> str:
    """A table of two columns."""
    return "\n| | |\n|---|---|\n" + "".join(f"| {name} | {text} |\n" for name, text in rows)


def section(path: str, command: Any, shared: set[tuple[str, str]]) -> str:
    """Everything about one command; of shared options the names."""
    text = f"\n{'##' if path.count(' ') < 2 else '###'} {path}\n\n```text\n{usage_line(path, command)}\n```\n\n"
    text += inspect.cleandoc(command.help or "").replace("\f", "").strip() + "\n"
    rows = list(rows_of(command))
    if own := [row for row in rows if row not in shared]:
        text += table(own)
    if names := [name for name, words in rows if (name, words) in shared]:
        text += f"\nShared: {', '.join(names)}.\n"
    return text


def page() -> str:
    """The whole page."""
    found = list(commands(ROOT, "sku"))
    counted = Counter(row for _, command in found for row in rows_of(command))
    shared = {row: None for row, count in counted.items() if count >= SHARED}
    head = f"{HEAD}\n## Shared by several commands\n{table(shared)}"
    return head + "".join(section(path, command, set(shared)) for path, command in found)
