"""What a model folder holds besides weights: what goes along to the unlearned model, and what stays behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from sku.negate.safetensors_layout import INDEX_FILE

_TAKEN = (
    "generation_config.json", "*token*.json", "*.model", "vocab*", "merges*", "*.tiktoken", "*.jinja",
    "chat_template.json", "added_tokens.json", "special_tokens_map.json", "*processor_config.json", "*.py", "LICENSE*",
    "LICENCE*", "NOTICE*", "USE_POLICY*", "additional_chat_templates",
)  # fmt: skip
"""Settings, tokenizer, code and terms of use. A model card stays behind: what it claims was measured on the base."""


def copy_companions(base: Path, folder: Path, weights: Iterable[str]) -> tuple[str, ...]:
    """Copies what a tokenizer and ``generate`` need; not the index and ``config.json``, which come last.

    Args:
        base: Folder of the original model.
        folder: Of the new one.
        weights: Names of the base's weight files, which have their counterparts.

    Returns:
        Names of what was left out.
    """
    known = {*weights, INDEX_FILE, "config.json"}
    left_out = []
    for path in sorted(base.iterdir()):
        if path.name in known:
            continue
        if not any(fnmatchcase(path.name, pattern) for pattern in _TAKEN):
            left_out.append(path.name)
        elif path.is_dir():
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(path, folder / path.name)
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in known:
            flush(path)
    return tuple(left_out)


def write_index(base: Path, folder: Path, total_size: int) -> None:
    """Writes the index of a sharded model anew, with the size of the new weights.

    Args:
        base: Folder of the original model; nothing is written where it has no index.
        folder: Of the new one.
        total_size: Of all tensors, in bytes.
    """
    if not (base / INDEX_FILE).is_file():
        return
    index = json.loads((base / INDEX_FILE).read_text(encoding="utf-8"))
    index["metadata"] = {**(index.get("metadata") or {}), "total_size": total_size}
    _write(folder / INDEX_FILE, index)


def write_config(base: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """Writes ``config.json``: the base's, with another type where the weights have another.

    Args:
        base: Folder of the original model.
        folder: Of the new one.
        dtype: Type of all weights; None where each kept its own.
    """
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        for part in _parts(config):
            for key in ("dtype", "torch_dtype"):
                if key in part:
                    part[key] = name
        if "torch_dtype" not in config:
            config["dtype"] = name
    _write(folder / "config.json", config)


def flush(path: Path) -> None:
    """Makes sure that a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A configuration and those of the models inside it."""
    yield config
    for name, value in config.items():
        if name.endswith("_config") and isinstance(value, dict):
            yield from _parts(value)


def _write(path: Path, content: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
