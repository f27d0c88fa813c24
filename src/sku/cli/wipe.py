"""``sku wipe``: remove bad models that were kept or left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sku.cli.console import results


def wipe(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="A run, a folder of runs, or a bad model: all marked folders in it."),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be removed.")] = False,
) -> None:
    """Remove hazardous weights: kept bad models, and the checkpoints of interrupted runs, which then begin anew."""
    from sku.wipe import hazardous_folders
    from sku.wipe import wipe as remove

    found = hazardous_folders(folder)
    for path in found:
        results.print(f"{'hazard' if dry_run else 'remove':<10}{path}", soft_wrap=True)
    if not found:
        results.print(f"nothing in {folder} is marked as hazardous", soft_wrap=True)
    if dry_run or not found:
        return
    if not yes and not typer.confirm("Remove them? A run that is still going on would fail."):
        raise typer.Exit(1)
    remove(found)
    results.print(
        f"removed   {len(found)}; what the disk keeps of freed blocks, snapshots and backups stays (SECURITY.md)",
        soft_wrap=True,
    )
