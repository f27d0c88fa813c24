"""``sku judge``: which judges there are, what is known of each, labels by people, and judging anew."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sku.cli import judge_calibrate, judge_labels, judge_train
from sku.cli.completion import judges
from sku.cli.console import print_json, results
from sku.cli.options import JsonOption

app = typer.Typer(
    help="Judges: list them, train one, calibrate them, label replies by hand, judge a finished evaluation again.",
    no_args_is_help=True,
)
app.command("export")(judge_labels.export)
app.command("again")(judge_labels.again)
app.command("train")(judge_train.train)
app.command("calibrate")(judge_calibrate.calibrate)


@app.command("list")
def list_judges(as_json: JsonOption = False) -> None:
    """List the judges of the package: kind, licence, model, and what it needs."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from sku.evaluate.judges.choose import judge_names

    headings = ("name", "kind", "licence", "model", "needs")
    rows = [(name, *_described(name)) for name in judge_names()]
    if as_json:
        print_json([dict(zip(headings, row, strict=True)) for row in rows])
        return
    table = Table(box=SIMPLE_HEAD, show_edge=False, header_style="bold", pad_edge=False)
    for heading in headings[:2]:
        table.add_column(heading, no_wrap=True)
    for heading in headings[2:]:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    results.print(table)


@app.command("show")
def show_judge(
    name: Annotated[str, typer.Argument(help="Judge of the package, or a judge file.", autocompletion=judges)],
    as_json: JsonOption = False,
) -> None:
    """Print a judge's file, or the card of one that needs none."""
    import dataclasses

    import yaml

    from sku.evaluate.judges.choose import RULES, judge_file_text, read_judge_file

    if as_json:
        print_json(_plain(dataclasses.asdict(_rule(name).card)) if name in RULES else read_judge_file(name))
        return
    if name in RULES:
        results.print(yaml.safe_dump(_plain(dataclasses.asdict(_rule(name).card)), sort_keys=False), soft_wrap=True)
        return
    results.print(judge_file_text(name), soft_wrap=True)


def _described(name: str) -> tuple[str, str, str, str]:
    from sku.evaluate.judges.choose import RULES, read_judge_file

    if name in RULES:
        return "rules", _rule(name).card.licence, "\u2013", "nothing"
    content = read_judge_file(name)
    return (
        str(content.get("kind", "")),
        str(content.get("licence", "\u2013")),
        str(content.get("model", "\u2013")),
        str(content.get("needs", "\u2013")),
    )


def _rule(name: str) -> Any:
    from sku.evaluate.judges.choose import build_judge

    return build_judge(name)


def _plain(card: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in card.items()}
