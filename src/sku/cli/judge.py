"""``sku judge``: what judges a reply, and how far it can be trusted."""

from __future__ import annotations

import typer

from sku.cli import judge_labels

app = typer.Typer(help="Judges: label replies by hand, judge a finished evaluation again.", no_args_is_help=True)


@app.callback()
def judge() -> None:
    """Judges: label replies by hand, judge a finished evaluation again."""


app.command("export")(judge_labels.export)
app.command("again")(judge_labels.again)
