"""``sku report``: a finished run as one HTML file."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import typer

from sku.cli.console import print_json
from sku.cli.console import results as console
from sku.cli.options import JsonOption
from sku.cli.tables import print_verdict
from sku.errors import RecipeError


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Folder of a finished run; several are set side by side.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="HTML file to write; report.html in the run's folder, of several runs in the current one."
        ),
    ] = None,
    plots: Annotated[
        Path | None, typer.Option("--plots", help="Write every picture into this folder too, as PNG and SVG.")
    ] = None,
    replies: Annotated[
        bool,
        typer.Option(
            "--replies/--no-replies", help="With the replies of both models, the harmful ones blurred, or without any."
        ),
    ] = True,
    live: Annotated[
        bool, typer.Option("--live", help="Follow one run in progress: RUN/live.html, which reloads itself.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the report of a run: one HTML file that needs no network, to read, search and print."""
    if live:
        _follow(runs, as_json=as_json)
        return
    from sku.report.html.page import write_report  # Imports matplotlib and scipy.

    target = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    written = write_report(runs, target, plots=plots, replies=replies)
    private = len(runs) == 1 and replies
    if as_json:
        plotted = [str(path) for path in written.plots]
        print_json({
            "verdicts": list(written.verdicts), "report": str(written.path), "plots": plotted,
            "holds_harmful_replies": private,
        })  # fmt: skip
        return
    for run, verdict in zip(runs, written.verdicts, strict=True):
        print_verdict(verdict if len(runs) == 1 else f"{run}: {verdict}")
    console.print(f"report    {written.path}", soft_wrap=True)
    if written.plots:
        console.print(f"plots     {plots}: {len(written.plots)} files", soft_wrap=True)
    if private:
        console.print("private   it holds harmful replies; --no-replies leaves them out", soft_wrap=True)


def _follow(runs: list[Path], *, as_json: bool) -> None:
    """Writes the page anew until the run is finished, or once for ``--json``."""
    from sku.report.live import LIVE_FILE, RELOAD, read_live, write_live

    if len(runs) > 1:
        raise RecipeError("--live follows one run: name one folder")
    folder = runs[0]
    if as_json:
        print_json(dataclasses.asdict(read_live(folder)))
        return
    console.print(f"live      {folder / LIVE_FILE}", soft_wrap=True)
    try:
        while not write_live(folder).finished:
            time.sleep(RELOAD)
        console.print(f"finished  sku report {folder} draws it", soft_wrap=True)
    except KeyboardInterrupt:
        console.print("the run goes on", soft_wrap=True)
    finally:
        (folder / LIVE_FILE).unlink(missing_ok=True)
