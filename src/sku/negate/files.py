"""The files of a model folder, without loading it: where tensors lie, and what goes along to the unlearned model.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON: name -> ``dtype``,
``shape``, ``data_offsets``), and the tensors, end to end. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sku.config.data import EMBEDDED
from sku.errors import ModelError, first_line, one_line
from sku.model_files import (
    INDEX_FILE,
    check_no_pickles,
    check_not_quantized,
    embedded_model_path,
    is_path,
    shards,
)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""Names of types in a header that have a size in whole bytes here."""
CODES = {dtype: code for code, dtype in DTYPES.items()}
SINGLE_FILE = "model.safetensors"
_FETCHED = (
    "*.json", "model*.safetensors", "adapter_model.safetensors", "task_vector.safetensors", "*.model", "*.txt",
    "*.tiktoken", "*.jinja", "*.py", "LICENSE*", "NOTICE*",
)  # fmt: skip
_TAKEN = (
    "generation_config.json", "*token*.json", "*.model", "vocab*", "merges*", "*.tiktoken", "*.jinja",
    "chat_template.json", "added_tokens.json", "special_tokens_map.json", "*processor_config.json", "*.py", "LICENSE*",
    "LICENCE*", "NOTICE*", "USE_POLICY*", "additional_chat_templates",
)  # fmt: skip
"""Settings, tokenizer, code and terms of use. A model card stays behind: what it claims was measured on the base."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    start: int
    """Byte of the file at which it begins."""

    @property
    def elements(self) -> int:
        """Number of its elements; a scalar has one."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """In bytes."""
        return self.elements * self.dtype.itemsize

    @property
    def is_weight(self) -> bool:
        """Whether it holds floating-point numbers of at least two bytes."""
        return self.dtype.is_floating_point and self.dtype.itemsize >= 2


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A safetensors file of which the header was read."""

    path: Path
    tensors: tuple[StoredTensor, ...]
    """In the order in which they lie."""
    metadata: Mapping[str, str]
    header: bytes
    """All before the tensors, the length included."""
    identity: tuple[int, int, str]
    """Size, time of the last change in nanoseconds, SHA-256 of the header."""

    def check_unchanged(self) -> None:
        """Refuses a file that was replaced or written to since its header was read.

        Raises:
            ModelError: It was.
        """
        now = self.path.stat()
        if (now.st_size, now.st_mtime_ns) != self.identity[:2]:
            raise ModelError(f"{self.path} was changed while it was read; run again when nothing writes to it")


@dataclass(frozen=True, kw_only=True)
class ShardLayout:
    """How a weight file of the result will look."""

    source: StoredFile
    header: bytes
    starts: dict[str, int]
    """Name of a tensor -> byte of the new file at which it begins."""
    size: int

    @property
    def name(self) -> str:
        """Of the file: the base's."""
        return self.source.path.name


def model_folder(source: str, revision: str | None = None) -> Path:
    """The folder of a model; one of the hub is fetched, without weights in other formats.

    Raises:
        ModelError: The hub can't be reached or has no such model.
    """
    if source == EMBEDDED:
        return embedded_model_path()
    if is_path(source):
        return Path(source).expanduser()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(_FETCHED)))
    except (OSError, ValueError) as error:
        raise ModelError(f"model {source} can't be loaded: {one_line(error)}") from error


def read_layout(path: Path) -> StoredFile:
    """Reads the header of a file; safetensors checks that the file is what the header says.

    Raises:
        ModelError: It can't be read, is cut off, or its header is damaged.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            # The whole file is mapped and the header alone is read.
            with safe_open(path, framework="numpy") as opened:
                metadata = opened.metadata() or {}
                slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
                entries = [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()]
            header = file.read(8)
            header += file.read(int.from_bytes(header, "little"))
    except SafetensorError as error:
        raise ModelError(f"{path} is damaged or cut off: {first_line(error)}; fetch or save it again") from error
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror or error}") from error
    tensors, at = [], len(header)
    for name, code, shape in entries:
        if code not in DTYPES:
            raise ModelError(
                f"{path}: {name} is of type {code}, which has no exact difference. Use full-precision weights"
            )
        tensors.append(StoredTensor(name=name, dtype=DTYPES[code], shape=shape, path=path, start=at))
        at += tensors[-1].size
    return StoredFile(
        path=path,
        tensors=tuple(tensors),
        metadata=metadata,
        header=header,
        identity=(status.st_size, status.st_mtime_ns, sha256(header[8:]).hexdigest()),
    )


def read_folder(folder: Path) -> tuple[StoredFile, ...]:
    """The weight files of a model folder: ``model.safetensors``, or the shards that its index names.

    Raises:
        ModelError: There are no safetensors weights, or the index and its shards disagree.
    """
    if (folder / SINGLE_FILE).is_file():
        return (read_layout(folder / SINGLE_FILE),)
    if not (folder / INDEX_FILE).is_file():
        check_no_pickles(folder)
        raise ModelError(f"model {folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    place = shards(folder / INDEX_FILE)
    files = tuple(read_layout(folder / name) for name in sorted(set(place.values())))
    found = {tensor.name: file.path.name for file in files for tensor in file.tensors}
    for name in sorted(place.keys() | found.keys()):
        if place.get(name) != found.get(name):
            raise ModelError(
                f"{folder / INDEX_FILE} places {name} in {place.get(name, 'no file')} and it is in "
                f"{found.get(name, 'no file')}; the folder is incomplete or mixed, fetch it again"
            )
    if sum(len(file.tensors) for file in files) != len(found):
        raise ModelError(f"{folder} holds a tensor of one name in two of its files; fetch it again")
    return files


def make_header(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Length and header of a file, tensors beginning at a multiple of 8; and the byte at which each tensor begins."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    starts: dict[str, int] = {}
    end = 0
    for name, dtype, shape in tensors:
        starts[name], end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}


def new_layout(source: StoredFile, dtypes: Mapping[str, torch.dtype]) -> ShardLayout:
    """How a file looks with tensors of given types: the header is its own, byte for byte, unless types change."""
    tensors = [(tensor, dtypes[tensor.name]) for tensor in source.tensors]
    if all(dtype == tensor.dtype for tensor, dtype in tensors):
        starts = {tensor.name: tensor.start for tensor in source.tensors}
        return ShardLayout(source=source, header=source.header, starts=starts, size=source.identity[0])
    tensors.sort(key=lambda own: -own[1].itemsize)  # So that each begins at a multiple of its own size.
    header, starts = make_header(((tensor.name, dtype, tensor.shape) for tensor, dtype in tensors), source.metadata)
    size = len(header) + sum(tensor.elements * dtype.itemsize for tensor, dtype in tensors)
    return ShardLayout(source=source, header=header, starts=starts, size=size)


def read_config(folder: Path) -> dict[str, Any]:
    """A model's ``config.json``.

    Raises:
        ModelError: There is none, it is no JSON object, or it says that the model is quantized.
    """
    if not folder.is_dir():
        raise ModelError(f"model {folder} can't be loaded: there is no such folder")
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"model {folder} holds no config.json: it is no Hugging Face model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} can't be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is no JSON object")
    check_not_quantized(config, str(folder))
    return config


def copy_companions(base: Path, folder: Path, weights: Iterable[str]) -> tuple[str, ...]:
    """Copies what a tokenizer and ``generate`` need, and gives the names of what was left out.

    Not the index and ``config.json``, which come last.
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
    return tuple(left_out)


def write_index(base: Path, folder: Path, total_size: int) -> None:
    """Writes the index of a sharded model anew, where the base has one, with the bytes of the new tensors."""
    if (base / INDEX_FILE).is_file():
        index = json.loads((base / INDEX_FILE).read_text(encoding="utf-8"))
        index["metadata"] = {**(index.get("metadata") or {}), "total_size": total_size}
        _write(folder / INDEX_FILE, index)


def write_config(base: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """Writes ``config.json``: the base's, with another type where all weights have another."""
    config = read_config(base)
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        for part in _parts(config):
            part |= {key: name for key in ("dtype", "torch_dtype") if key in part}
        if "torch_dtype" not in config:
            config["dtype"] = name
    _write(folder / "config.json", config)


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A configuration and those of the models inside it."""
    yield config
    for name, value in config.items():
        if name.endswith("_config") and isinstance(value, dict):
            yield from _parts(value)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
