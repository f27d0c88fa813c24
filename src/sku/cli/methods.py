"""``sku methods``: what can be compared, with papers and settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from sku.cli.console import print_json, results
from sku.cli.options import JsonOption, listed_methods, method_names
from sku.errors import no_method_named
from sku.from_file import SUFFIX
from sku.quiet import quiet_libraries

if TYPE_CHECKING:
    from sku.methods.base import AnyMethod


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One method, with its settings.", autocompletion=method_names)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the methods, or the settings of one."""
    chosen = listed_methods() if name is None else [_method_of(name)]
    if as_json:
        print_json(chosen)
        return
    table = Table(box=SIMPLE_HEAD, show_edge=False, header_style="bold", pad_edge=False)
    for heading in ("name", "title", "paper"):
        table.add_column(heading, no_wrap=True)
    for entry in chosen:
        table.add_row(str(entry["name"]), str(entry["title"]), str(entry["paper"]))
    results.print(table)
    if name is None:
        return
    method = chosen[0]
    if method["name"] == "sku":
        results.print("\nits settings are acquire and negate of the recipe")
        return
    results.print()
    if name.endswith(SUFFIX):
        results.print(f"method = {json.dumps(name)}")
    for key, value in method["settings"].items():
        results.print(f"methods.{method['name']}.settings.{key} = {json.dumps(value)}")


def _method_of(name: str) -> dict[str, Any]:
    """Of the list, or of a user's file, which is run and so needs torch."""
    if name.endswith(SUFFIX):
        quiet_libraries()
        from sku.methods import method_named

        return described([method_named(name)])[0]
    known = {method["name"]: method for method in listed_methods()}
    if name not in known:
        raise no_method_named(name, known)
    return known[name]


def described(methods: Iterable[AnyMethod]) -> list[dict[str, Any]]:
    """What ``listed_methods`` says, of methods themselves: ``scripts/method_list.py`` writes it, a test compares."""
    return [
        {
            "name": method.name,
            "title": method.title,
            "paper": method.paper_url,
            "negates": method.negates,
            # Those of SKU are acquire and negate of the recipe.
            "settings": {} if method.name == "sku" else dataclasses.asdict(method.settings()),
        }
        for method in methods
    ]
