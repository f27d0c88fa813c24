"""``sku card``: write the model cards of a finished run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sku.cli.console import print_json, results
from sku.cli.options import JsonOption


def card(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished sku run.")],
    model_license: Annotated[
        str | None,
        typer.Option("--license", help="Licence of the model, such as apache-2.0, in place of the recipe's."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model", metavar="HUB_ID", help="Hub id of the base, where the run read it from a folder."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write README.md of the unlearned model and its adapter from the run's records. What is there is replaced."""
    from sku.report.card import CardChoices, write_cards

    cards = write_cards(run, CardChoices(license=model_license, base_model=base_model))
    if as_json:
        print_json({part: str(path) for part, path in cards.items()})
        return
    for part, path in cards.items():
        results.print(f"{part:<10}{path}", soft_wrap=True)
