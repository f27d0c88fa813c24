"""``sku doctor``: what this machine has for a run."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.text import Text

from sku._version import __version__
from sku.cli import options
from sku.cli.console import print_json, results
from sku.errors import OutputError
from sku.from_file import file_sha256
from sku.quiet import quiet_imports
from sku.storage import check_can_be_made, free_bytes, hazardous_folders

Status = Literal["ok", "warning", "problem"]
TESTED: Mapping[str, str] = {
    "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "accelerate": "1.15.0", "datasets": "5.2.0",
    "tokenizers": "0.23.3", "safetensors": "0.8.0", "huggingface_hub": "2.4.0", "numpy": "2.4.6", "scipy": "1.17.1",
}  # fmt: skip
"""Versions that this release was tested with, those of ``constraints.txt``."""
SUPPORTED: Mapping[str, tuple[str, str | None]] = {
    "torch": ("2.7", "3"), "transformers": ("5.23", "6"), "peft": ("0.19", "1"), "accelerate": ("1.10", "2"),
    "datasets": ("4.0", "6"), "tokenizers": ("0.22", None), "safetensors": ("0.6", None),
    "huggingface_hub": ("1.0", None), "numpy": ("2.0", None), "scipy": ("1.13", None),
}  # fmt: skip
"""From which version on, and below which: the ranges of ``pyproject.toml``."""
EXTRAS: Mapping[str, str] = {
    "bitsandbytes": "tuning qlora", "gguf": "GGUF models", "openai": "judges behind an API",
    "lm_eval": "lm-evaluation-harness", "hf_xet": "faster transfers from and to the hub",
}  # fmt: skip
_LITTLE_SPACE = 20 * 2**30
_TOO_LITTLE_SPACE = 2**30
_PATIENCE = 5.0
"""Seconds that the hub has to answer."""
_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    name: str
    status: Status
    found: str
    advice: str = ""
    """What to do; empty where nothing needs doing."""


def doctor(
    out: Annotated[Path, typer.Option(help="Where runs will go.")] = Path("runs"),
    offline: Annotated[bool, typer.Option("--offline", help="Don't ask the hub for a sign of life.")] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Look at versions, devices, disk, hub and caches, and say what to do. Exit code 1 where a run would fail."""
    quiet_imports()
    checks = examine(out, ask_hub=not offline)
    ready = usable(checks)
    if as_json:
        listed = [dataclasses.asdict(check) for check in checks]
        print_json({"ready": ready, "checks": listed})
    else:
        for check in checks:
            line = Text.assemble((f"{check.status:<9}", _STYLES[check.status]), f"{check.name:<17}{check.found}")
            results.print(line)
            if check.advice:
                results.print(f"{'':<26}{check.advice}")
        warnings = sum(check.status == "warning" for check in checks)
        found = f", {warnings} warning{'' if warnings == 1 else 's'}" if warnings else ""
        results.print(f"\n{'ready' if ready else 'not ready: see the problems above'}{found}")
    if not ready:
        raise typer.Exit(1)


def examine(folder: Path, *, ask_hub: bool = True) -> list[Check]:
    """Looks at everything.

    Args:
        folder: Where runs will go.
        ask_hub: Ask the hub for a sign of life, unless ``HF_HUB_OFFLINE`` forbids it.

    Returns:
        Checks in reading order.
    """
    from huggingface_hub import constants

    return [
        _python(),
        *(_package(name) for name in TESTED),
        *_extras(),
        *_devices(),
        _threads(),
        _space(folder),
        _writable("run folder", folder),
        _writable("hub cache", Path(constants.HF_HUB_CACHE)),
        _left_behind(folder),
        _hub(ask_hub=ask_hub),
        _token(),
        _embedded_model(),
    ]


def usable(checks: list[Check]) -> bool:
    """Whether a run can be expected to work: no check is a problem."""
    return all(check.status != "problem" for check in checks)


def _python() -> Check:
    version = platform.python_version()
    found = f"{version}, {platform.system()} {platform.machine()}, sku {__version__}"
    if os.name != "posix":
        advice = "folders can't be kept to their owner here: use Linux, macOS or WSL for hazardous weights"
        return Check("python", "warning", found, advice)
    return Check("python", "ok", found)


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``2.13.0+cpu`` is (2, 13, 0)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else ()


def _package(name: str) -> Check:
    tested, (lowest, below) = TESTED[name], SUPPORTED[name]
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "problem", "missing", f"pip install '{name}=={tested}'")
    own = numbers(version)
    if own < numbers(lowest) or (below is not None and own >= numbers(below)):
        wanted = f">={lowest}" + (f",<{below}" if below else "")
        return Check(name, "problem", version, f"pip install '{name}{wanted}'")
    if own != numbers(tested):
        advice = f"tested with {tested}; other versions give other last bits"
        return Check(name, "warning", version, advice)
    return Check(name, "ok", version)


def _extras() -> Iterator[Check]:
    for name, purpose in EXTRAS.items():
        try:
            yield Check(name, "ok", f"{metadata.version(name)} (for {purpose})")
        except metadata.PackageNotFoundError:
            yield Check(name, "ok", f"not installed; only for {purpose}")


def _devices() -> Iterator[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:
        advice = "install torch again, for this machine's driver: https://pytorch.org/get-started/locally"
        yield Check("device", "problem", f"torch can't be imported: {error}", advice)
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield _gpu(index, torch)
        return
    if torch.backends.mps.is_available():
        yield Check("device", "ok", "MPS")
        return
    built_for = torch.version.cuda or getattr(torch.version, "hip", None)
    if built_for:
        advice = "is there a GPU, and does nvidia-smi see it? Else models above 1 B parameters will take very long"
        yield Check("device", "warning", f"CPU only; torch is built for CUDA {built_for}", advice)
    else:
        yield Check("device", "ok", "CPU only; enough for models up to some 100 M parameters")


def _gpu(index: int, torch: Any) -> Check:
    name = f"GPU {index}"
    try:
        free, total = torch.cuda.mem_get_info(index)
        torch.zeros(1, device=f"cuda:{index}").add_(1).item()
    except RuntimeError as error:
        found = f"{torch.cuda.get_device_name(index)}: {' '.join(str(error).split())[:120]}"
        return Check(name, "problem", found, "free the GPU, or leave it out: CUDA_VISIBLE_DEVICES")
    sizes = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    found = f"{torch.cuda.get_device_name(index)}, {sizes}, bfloat16 {torch.cuda.is_bf16_supported()}"
    if free < total / 2:
        return Check(name, "warning", found, "another process holds most of it")
    return Check(name, "ok", found)


def _threads() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    told = os.environ.get("OMP_NUM_THREADS")
    found = f"{cores} cores for this process, OMP_NUM_THREADS {told or 'not set'}"
    if told is not None and told.isdigit() and int(told) > cores:
        return Check("threads", "warning", found, f"export OMP_NUM_THREADS={cores}")
    return Check("threads", "ok", found)


def _space(folder: Path) -> Check:
    free = free_bytes(folder)
    found = f"{free / 2**30:.1f} GiB free at {folder}"
    if free < _TOO_LITTLE_SPACE:
        return Check("disk", "problem", found, "free some space or choose another --out")
    if free < _LITTLE_SPACE:
        advice = "a run keeps up to four times the model's size: enough for small models only"
        return Check("disk", "warning", found, advice)
    return Check("disk", "ok", found)


def _writable(name: str, folder: Path) -> Check:
    try:
        check_can_be_made(folder)
    except OutputError as error:
        advice = "set HF_HOME to a folder of yours" if name == "hub cache" else "choose another --out"
        return Check(name, "problem", str(error), advice)
    return Check(name, "ok", f"{folder} can be written")


def _left_behind(folder: Path) -> Check:
    found = hazardous_folders(folder) if folder.is_dir() else []
    if found:
        told = f"{len(found)} in {folder}, the first is {found[0]}"
        return Check("bad models", "warning", told, f"sku wipe {folder} removes them")
    return Check("bad models", "ok", f"none left in {folder}")


def _hub(*, ask_hub: bool) -> Check:
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        found = "switched off by HF_HUB_OFFLINE; models and data come from this machine"
        return Check("hub", "ok", found)
    if not ask_hub:
        return Check("hub", "ok", f"{constants.ENDPOINT}, not asked")
    try:
        status = get_session().get(f"{constants.ENDPOINT}/api/models?limit=1", timeout=_PATIENCE).status_code
        found = f"{constants.ENDPOINT} answers with HTTP {status}"
    except Exception as error:  # noqa: BLE001 - whatever a network does, the hub is out of reach
        status, found = 599, f"{constants.ENDPOINT} is out of reach ({type(error).__name__})"
    if status >= 400:
        advice = "set HF_HUB_OFFLINE=1 and use local folders, or look at the network and HF_ENDPOINT"
        return Check("hub", "warning", found, advice)
    return Check("hub", "ok", found)


def _token() -> Check:
    from huggingface_hub import get_token

    told = "there is one (not shown)" if get_token() else "none; only gated models and sku push need one"
    return Check("hub token", "ok", told)


def _embedded_model() -> Check:
    folder = Path(str(resources.files("sku") / "world" / "model"))
    advice = "install the package again"
    try:
        wanted = json.loads((folder / "CHECKSUMS.json").read_text(encoding="utf-8"))["sha256"]
        wrong = [name for name, digest in wanted.items() if file_sha256(folder / name) != digest]
    except (OSError, ValueError, KeyError) as error:
        return Check("embedded model", "problem", f"can't be read: {error}", advice)
    if wrong:
        return Check("embedded model", "problem", f"changed: {', '.join(wrong)}", advice)
    return Check("embedded model", "ok", f"{len(wanted)} files as released")
