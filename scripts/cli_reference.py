"""Writes ``docs/cli.md`` from the commands themselves.

    python scripts/cli_reference.py            write the page
    python scripts/cli_reference.py --check    say whether it is up to date (exit code 1 where it is not)

It reads the parameters, not the help that a terminal shows, so width and colour play no part.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from sku.__main__ import app

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
ROOT: Any = typer.main.get_command(app)
CONTEXT = ROOT.context_class(ROOT, info_name="sku")
HEAD = """\
# Command line

<!-- Written by scripts/cli_reference.py: change the commands, not this page. -->

Every command prints its options with `-h`. A mistake is one line on standard error and exit code 2; `Ctrl-C` is exit
code 130, SIGTERM 143. Results go to standard output, progress and messages to standard error. With `--json` the result
is one JSON document and nothing else. What holds for all commands, dry runs and completion among it:
[using the command line](command_line.md).
"""


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """All commands below one, with the words that call them; groups come before what they hold."""
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, f"{path} {name}")


def text_of(value: object) -> str:
    """A text as a cell of a table."""
    return " ".join(inspect.cleandoc(str(value or "")).split()).replace("|", "\\|")


def default_of(parameter: Any) -> str:
    """What holds where an option is left out, where that is something to know."""
    default = parameter.default
    if parameter.required or default is None or default is False or callable(default) or default in ((), []):
        return ""
    return f"`{default}`"


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


def table(heading: str, rows: list[tuple[str, str, str]]) -> Iterator[str]:
    """A table of three columns, or nothing where there is no row."""
    if rows:
        yield f"\n| {heading} | | default |\n|---|---|---|\n"
        yield from (f"| {name} | {text} | {default} |\n" for name, text, default in rows)


def section(path: str, command: Any) -> Iterator[str]:
    """Everything about one command."""
    yield f"\n{'##' if path.count(' ') < 2 else '###'} {path}\n\n"
    yield f"```text\n{usage_line(path, command)}\n```\n\n"
    yield inspect.cleandoc(command.help or "").replace("\f", "").strip() + "\n"
    shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
    arguments = [item for item in shown if item.param_type_name == "argument"]
    options = [item for item in shown if item.param_type_name == "option" and item.name != "help"]
    yield from table(
        "argument",
        [(f"`{item.metavar or item.name.upper()}`", text_of(item.help), default_of(item)) for item in arguments],
    )
    yield from table(
        "option",
        [
            (
                f"`{text_of(written(item))}`",
                text_of(item.help) + (" **Required.**" if item.required else ""),
                default_of(item),
            )
            for item in options
        ],
    )
    if hasattr(command, "commands"):
        below = (
            (f"`{path} {name}`", text_of(item.help).split(". ")[0].removesuffix("."))
            for name, item in command.commands.items()
        )
        yield "\n| command | |\n|---|---|\n"
        yield from (f"| {name} | {text} |\n" for name, text in below)


def page() -> str:
    """The whole page."""
    return HEAD + "".join("".join(section(path, command)) for path, command in commands(ROOT, "sku"))


def main() -> int:
    """Writes or checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
        print(f"{PAGE} is not up to date: run python scripts/cli_reference.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
