"""``sku report``: a finished run as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sku.cli.console import print_json, print_verdict
from sku.cli.console import results as console
from sku.cli.options import JsonOption


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
    as_json: JsonOption = False,
) -> None:
    """Write the report of a run: one HTML file that needs no network, to read, search and print."""
    from sku.report.html.run_folder import verdict_line
    from sku.report.html.write import write_report  # Imports matplotlib and scipy.

    target = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    written, drawn = write_report(runs, target, plots=plots, replies=replies)
    verdicts = [verdict_line(run) for run in runs]
    private = len(runs) == 1 and replies
    if as_json:
        plotted = [str(path) for path in drawn]
        print_json({"verdicts": verdicts, "report": str(written), "plots": plotted, "holds_harmful_replies": private})
        return
    for run, verdict in zip(runs, verdicts, strict=True):
        print_verdict(verdict if len(runs) == 1 else f"{run}: {verdict}")
    console.print(f"report    {written}", soft_wrap=True)
    if drawn:
        console.print(f"plots     {plots}: {len(drawn)} files", soft_wrap=True)
    if private:
        console.print("private   it holds harmful replies; --no-replies leaves them out", soft_wrap=True)
