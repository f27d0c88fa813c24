"""How a dry run is printed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sku.cli.console import print_json, results

if TYPE_CHECKING:
    from sku.dry_run import DryRun


def print_dry_run(found: DryRun, *, as_json: bool) -> None:
    """What would be done and written, as lines or as one JSON document."""
    if as_json:
        print_json(found.to_dict())
        return
    lines: list[tuple[str, str]] = []
    lines += [(name, _text(value)) for name, value in found.settings.items()]
    if found.examples:
        lines.append(("examples", _text(found.examples)))
    lines.append(("would do", "; ".join(found.stages)))
    lines.append(("into", str(found.out)))
    lines.append(("writes", ", ".join(found.writes)))
    free = found.to_dict()["free_bytes"]
    size = f"about {found.disk_bytes / 2**20:,.0f} MiB at most" if found.disk_bytes else "replies and figures only"
    lines.append(("disk", f"{size}, {free / 2**20:,.0f} MiB are free"))
    if found.memory is not None:
        lines.append(("memory", found.memory))
    if found.bad_model != "none":
        lines.append(("hazard", f"the bad model of stage 1 is {found.bad_model}"))
    lines += [("note", note) for note in found.notes]
    width = max(len(name) for name, _ in lines) + 2
    for name, text in lines:
        results.print(f"{name:<{width}}{text}", soft_wrap=True)
    results.print(f"\nnothing was written: {found.command} without --dry-run does it", soft_wrap=True)


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {entry}" for name, entry in value.items())
    return str(value)
