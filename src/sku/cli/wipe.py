"""``sku wipe``: remove bad models that were kept or left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sku.cli.console import errors, print_json, results
from sku.cli.options import JsonOption


def wipe(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="A run, a folder of runs, or a bad model: all marked folders in it."),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be removed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove hazardous weights: kept bad models, and the checkpoints of interrupted runs, which then begin anew."""
    from sku.storage import hazardous_folders
    from sku.storage import wipe as remove

    found = hazardous_folders(folder)
    removes = bool(found) and not dry_run
    asks = removes and not yes
    for path in found if asks or not as_json else ():  # What is asked about must be seen.
        (errors if as_json else results).print(f"{'hazard' if dry_run else 'remove':<10}{path}")
    if not found and not as_json:
        results.print(f"nothing in {folder} is marked as hazardous")
    if asks and not typer.confirm("Remove them? A run that is still going on would fail.", err=True):
        raise typer.Exit(1)
    if removes:
        remove(found)
    if as_json:
        print_json({"hazardous": [str(path) for path in found], "removed": len(found) if removes else 0})
    elif removes:
        _print_removed(len(found))


def _print_removed(count: int) -> None:
    results.print(f"removed   {count}; what the disk keeps of freed blocks, snapshots and backups stays (SECURITY.md)")
