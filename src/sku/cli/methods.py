"""``sku methods``: what can be compared, with papers and settings."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from sku.cli.completion import methods as method_names
from sku.cli.console import print_json, results
from sku.cli.options import JsonOption
from sku.quiet import quiet_libraries


def methods(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="One method, with its settings.", autocompletion=method_names),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the methods, or the settings of one."""
    quiet_libraries()
    from sku.methods import METHODS, method_named

    chosen = list(METHODS) if name is None else [method_named(name)]
    described = [
        {
            "name": method.name,
            "title": method.title,
            "paper": method.paper_url,
            "negates": method.weight_step is not None,
            "settings": {} if method.name == "sku" else _defaults(method.settings),
        }
        for method in chosen
    ]
    if as_json:
        print_json(described)
        return
    table = Table(box=SIMPLE_HEAD, show_edge=False, header_style="bold", pad_edge=False)
    for heading in ("name", "title", "paper"):
        table.add_column(heading, no_wrap=True)
    for entry in described:
        table.add_row(str(entry["name"]), str(entry["title"]), str(entry["paper"]))
    results.print(table)
    if name is None:
        return
    if name == "sku":
        results.print("\nits settings are acquire and negate of the recipe")
    for key, value in _defaults(chosen[0].settings).items() if name != "sku" else ():
        results.print(f"methods.{name}.settings.{key} = {json.dumps(value)}")


def _defaults(settings: type) -> dict[str, object]:
    return dataclasses.asdict(settings())
