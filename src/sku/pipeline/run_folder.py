"""The folder of a run and its manifest: what is run, and how far it has come."""

from __future__ import annotations

import copy
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sku._version import __version__
from sku.config import Recipe
from sku.config.check import content_sha256
from sku.errors import OutputError, named_memory_errors
from sku.evaluate.generation import StageProgress
from sku.processes import Processes
from sku.progress import without_secrets
from sku.storage import (
    LOCK_FILE,
    RECORD_VERSION,
    acquire_lock,
    check_can_be_made,
    named_disk_errors,
    new_folder,
    remove_left_behind,
    write_json,
)

_PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers", "numpy", "scipy",
)  # fmt: skip


class RunFolder:
    """A run's folder, which the first process alone writes to."""

    def __init__(self, path: Path, processes: Processes) -> None:
        """Names the folder; nothing is made or read yet.

        Args:
            path: Of the run.
            processes: Of the run.
        """
        self.path, self.processes = path, processes
        self.progress: StageProgress = lambda _stage, _done, _total: None
        """Called when a stage begins and when it ends."""
        self.manifest: dict[str, Any] = {}
        self.is_new = False
        """Whether ``open`` made it; in the first process."""
        self._lock: int | None = None

    def open(self, recipe: Recipe, *, resume: bool) -> None:
        """Makes the folder, or checks that it belongs to an interrupted run of this recipe.

        Args:
            recipe: What is run.
            resume: The folder may be there.

        Raises:
            OutputError: It is there without ``resume``, or belongs to another run, a complete one, one that is still
                running, or one of another number of processes; or it can't be read or written.
        """
        self.manifest = self.processes.run_on_rank0(lambda: self._opened_manifest(recipe, resume=resume))

    def check(self, recipe: Recipe, *, resume: bool) -> dict[str, Any]:
        """Refuses what ``open`` would refuse, and makes nothing.

        Args:
            recipe: As in ``open``.
            resume: As in ``open``.

        Returns:
            The manifest that is there; empty where there is no folder.

        Raises:
            OutputError: As ``open``.
        """
        if not self.path.exists():
            check_can_be_made(self.path)
            return {}
        if not resume:
            raise OutputError(f"{self.path} already exists; choose another --out, or add --resume to go on with it")
        manifest = _read_manifest(self.path)
        if manifest["recipe_sha256"] != content_sha256(recipe.to_dict()):
            raise OutputError(f"{self.path} belongs to a run with another recipe; choose another --out")
        if manifest["status"] == "complete":
            raise OutputError(f"the run in {self.path} is already complete; choose another --out")
        begun_with = manifest.setdefault("processes", 1)
        if begun_with != self.processes.count and any(self.path.rglob("checkpoint-*")):
            raise OutputError(
                f"the run in {self.path} was begun with {begun_with} processes, and checkpoints fit no other number: "
                f"start {begun_with} here too, not {self.processes.count}, or choose another --out"
            )
        return manifest

    def _opened_manifest(self, recipe: Recipe, *, resume: bool) -> dict[str, Any]:
        if not self.path.exists():
            content = recipe.to_dict()
            fresh = {
                "schema_version": RECORD_VERSION,
                "status": "running",
                "recipe": content,
                "recipe_sha256": content_sha256(content),
                "environment": environment(),
                "processes": self.processes.count,
                "seconds": {},
            }
            with new_folder(self.path, private=True) as temporary:
                write_json(temporary / "manifest.json", fresh)
                lock = acquire_lock(temporary, by_file=True)  # Before others can find it.
            self._lock, self.is_new = lock, True
            return _read_manifest(self.path)
        self.check(recipe, resume=resume)  # A folder that is no part of this run is not even locked.
        with named_disk_errors(self.path):
            self._lock = acquire_lock(self.path, by_file=True)
        manifest = self.check(recipe, resume=resume)  # Another call may have gone on with it meanwhile.
        remove_left_behind(self.path)
        return manifest

    def close(self) -> None:
        """Lets another process go on with the run."""
        if self._lock is not None:
            with suppress(OSError):
                (self.path / LOCK_FILE).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def note(self, **entries: Any) -> None:
        """Adds entries to the manifest, or replaces them, and writes it.

        Args:
            **entries: As JSON holds them.
        """
        self.manifest.update(copy.deepcopy(entries))
        if self.processes.is_main:
            write_json(self.path / "manifest.json", self.manifest)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Tells that a stage begins and ends, and adds its seconds to the manifest.

        Args:
            stage: Its name in the manifest.

        Raises:
            NoMemoryError: Memory ran out in it.
        """
        self.progress(stage, 0, 1)
        started = time.monotonic()
        with named_memory_errors(stage):
            yield
        seconds = self.manifest["seconds"]
        seconds[stage] = round(seconds.get(stage, 0.0) + time.monotonic() - started, 2)
        self.note(seconds=seconds)
        self.progress(stage, 1, 1)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise OutputError(f"{folder} is no run folder: it has no manifest.json; choose another --out") from None
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(f"{path} is damaged ({error}); choose another --out") from error
    needed = {"schema_version", "recipe_sha256", "status", "seconds"}
    if not isinstance(content, dict) or needed - content.keys() or content["schema_version"] != RECORD_VERSION:
        raise OutputError(f"{path} is damaged or not of this version of SKU; choose another --out")
    return content


def environment() -> dict[str, Any]:
    """Versions, hardware and the commit of a source checkout, for the manifest."""
    return {
        "sku": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "command": without_secrets(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]])),
    }


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the checkout this package is run from, with ``+changes``; None for an installed package."""
    here = Path(__file__).resolve().parent
    if here.parent.name != "src":
        return None

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return f"{commit}+changes" if commit and git("status", "--porcelain") else commit
