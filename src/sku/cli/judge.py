"""``sku judge``: the judges, and how far they can be trusted."""

from __future__ import annotations

import typer

from sku.cli import judge_calibrate

app = typer.Typer(help="Judges, and how far they can be trusted.", no_args_is_help=True)
app.command("calibrate")(judge_calibrate.calibrate)


@app.callback()
def judge() -> None:
    """Judges, and how far they can be trusted."""
