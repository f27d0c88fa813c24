"""What a run was made with: versions, hardware, code."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sku._version import __version__
from sku.quiet import without_secrets

_PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers", "numpy", "scipy",
)  # fmt: skip


def content_sha256(content: Any) -> str:
    """Hash of plain data, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


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
