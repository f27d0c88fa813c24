"""``sku doctor``: what this machine has for a run."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import typer
from packaging.requirements import Requirement

from sku._version import __version__
from sku.cli import options
from sku.cli.console import print_json, results
from sku.errors import OutputError
from sku.quiet import quiet_imports
from sku.storage import check_can_be_made, free_bytes

_LITTLE_SPACE, _TOO_LITTLE_SPACE = 20 * 2**30, 2**30


class Check(NamedTuple):
    """One thing looked at."""

    name: str
    status: Literal["ok", "warning", "problem"]
    found: str


def doctor(
    out: Annotated[Path, typer.Option(help="Where runs will go.")] = Path("runs"),
    offline: Annotated[bool, typer.Option("--offline", help="Don't ask the hub for a sign of life.")] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Look at versions, devices, disk and hub. Exit code 1 where a run would fail."""
    quiet_imports()
    checks = [*_packages(), _device(), _disk(out), *([] if offline else [_hub()])]
    ready = all(check.status != "problem" for check in checks)
    if as_json:
        print_json({"ready": ready, "checks": [check._asdict() for check in checks]})
    else:
        for check in checks:
            results.print(f"{check.status:<9}{check.name:<19}{check.found}")
        results.print(f"\n{'ready' if ready else 'not ready: see the problems above'}")
    if not ready:
        raise typer.Exit(1)


def _packages() -> Iterator[Check]:
    """Python, and what the package requires, that of its extras where it is installed."""
    yield Check("python", "ok", f"{platform.python_version()}, {platform.platform()}, sku {__version__}")
    required = {wanted.name: wanted for wanted in map(Requirement, metadata.requires("sku-unlearning") or ())}
    for wanted in required.values():
        if any(f'"{extra}"' in str(wanted.marker) for extra in ("dev", "docs")):
            continue
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            if wanted.marker is None:
                yield Check(wanted.name, "problem", f"missing: pip install '{wanted}'")
            continue
        if wanted.specifier.contains(version, prereleases=True):
            yield Check(wanted.name, "ok", version)
        else:
            status: Literal["warning", "problem"] = "problem" if wanted.marker is None else "warning"
            yield Check(wanted.name, status, f"{version}: pip install '{wanted.name}{wanted.specifier}'")


def _device() -> Check:
    try:
        import torch

        if not torch.cuda.is_available():
            return Check("device", "ok", "MPS" if torch.backends.mps.is_available() else "CPU only")
        sizes = []
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            torch.zeros(1, device=f"cuda:{index}").add_(1).item()
            sizes.append(f"{torch.cuda.get_device_name(index)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    except (ImportError, OSError, RuntimeError) as error:
        return Check("device", "problem", f"torch can't use it: {' '.join(str(error).split())[:200]}")
    return Check("device", "ok", "; ".join(sizes))


def _disk(folder: Path) -> Check:
    try:
        check_can_be_made(folder)
    except OutputError as error:
        return Check("disk", "problem", f"{error}: choose another --out")
    free = free_bytes(folder)
    status: Literal["ok", "warning", "problem"] = "ok" if free >= _LITTLE_SPACE else "warning"
    return Check("disk", "problem" if free < _TOO_LITTLE_SPACE else status, f"{free / 2**30:.1f} GiB free at {folder}")


def _hub() -> Check:
    from sku.model_files import out_of_reach

    why = out_of_reach()
    return Check("hub", "ok" if why is None else "warning", "answers" if why is None else why)
