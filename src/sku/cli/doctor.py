"""``sku doctor``: whether this machine is ready for a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from sku.cli.console import print_json, results
from sku.cli.options import JsonOption
from sku.quiet import quiet_imports

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def doctor(
    out: Annotated[Path, typer.Option("--out", help="Where runs will go.")] = Path("runs"),
    offline: Annotated[bool, typer.Option("--offline", help="Don't ask the hub for a sign of life.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Look at versions, devices, disk, hub and caches, and say what to do. Exit code 1 where a run would fail."""
    quiet_imports()
    from sku.doctor import examine, usable

    checks = examine(out, ask_hub=not offline)
    ready = usable(checks)
    if as_json:
        listed = [dataclasses.asdict(check) for check in checks]
        print_json({"ready": ready, "checks": listed})
    else:
        for check in checks:
            line = Text.assemble((f"{check.status:<9}", _STYLES[check.status]), f"{check.name:<17}{check.found}")
            results.print(line, soft_wrap=True)
            if check.advice:
                results.print(f"{'':<26}{check.advice}", soft_wrap=True)
        warnings = sum(check.status == "warning" for check in checks)
        found = f", {warnings} warning{'' if warnings == 1 else 's'}" if warnings else ""
        results.print(f"\n{'ready' if ready else 'not ready: see the problems above'}{found}")
    if not ready:
        raise typer.Exit(1)
