"""Where the tensors of safetensors files lie: headers read strictly, without reading a weight.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> ``dtype``, ``shape``,
``data_offsets``), and the tensors, end to end. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from sku.errors import ModelError
from sku.model_files import is_file_name

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""Names of types in a header that have a size in whole bytes here."""
CODES = {dtype: code for code, dtype in DTYPES.items()}
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000


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


def read_layout(path: Path) -> StoredFile:
    """Reads the header of a file and checks that the file is what the header says.

    Args:
        path: A safetensors file.

    Returns:
        Its tensors.

    Raises:
        ModelError: It can't be read, is cut off, or its header is damaged.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_LONGEST_HEADER, status.st_size - 8):
                raise _damaged(path, f"its header would be {length} bytes long, the file is {status.st_size}")
            text = file.read(length)
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror or error}") from error
    entries = _parsed(path, text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its metadata is not text")
    data = 8 + length
    tensors = [_tensor(path, name, entry, data) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.start + tensor.size))
    end = data
    for tensor in tensors:
        if tensor.start != end:
            raise _damaged(path, f"{tensor.name} overlaps another tensor or leaves a hole before it")
        end += tensor.size
    if end != status.st_size:
        raise _damaged(path, f"its tensors end at byte {end} and the file at {status.st_size}")
    return StoredFile(
        path=path,
        tensors=tuple(tensors),
        metadata=metadata,
        header=length.to_bytes(8, "little") + text,
        identity=(status.st_size, status.st_mtime_ns, sha256(text).hexdigest()),
    )


def read_folder(folder: Path) -> tuple[StoredFile, ...]:
    """The weight files of a model folder: ``model.safetensors``, or the shards that its index names.

    Args:
        folder: A Hugging Face model folder.

    Returns:
        Files by name. No tensor is in two of them, and each is where the index says.

    Raises:
        ModelError: There are no safetensors weights, or the index and its shards disagree.
    """
    if (folder / SINGLE_FILE).is_file():
        return (read_layout(folder / SINGLE_FILE),)
    if not (folder / INDEX_FILE).is_file():
        raise ModelError(_no_weights(folder))
    place = _weight_map(folder / INDEX_FILE)
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
    """The beginning of a file.

    Args:
        tensors: Name, type and shape, in the order in which they will lie.
        metadata: Kept as it is.

    Returns:
        Length and header, padded so that the tensors begin at a multiple of 8; and the byte of the file at which each
        tensor begins.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    starts = {
        name: 8 + len(text) + entry["data_offsets"][0] for name, entry in entries.items() if name != "__metadata__"
    }
    return len(text).to_bytes(8, "little") + text, starts


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise _damaged(path, "its header names something twice")
        return dict(pairs)

    try:
        entries = json.loads(text, object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise _damaged(path, "its header is not JSON") from error
    if not isinstance(entries, dict):
        raise _damaged(path, "its header is not a JSON object")
    return entries


def _tensor(path: Path, name: str, entry: Any, data: int) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"the entry of {name} does not hold dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _damaged(path, f"the shape or the offsets of {name} are not whole numbers")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise ModelError(
            f"{path}: {name} is of type {entry['dtype']}, which has no exact difference. Use full-precision weights"
        )
    tensor = StoredTensor(
        name=name, dtype=DTYPES[entry["dtype"]], shape=tuple(shape), path=path, start=data + offsets[0]
    )
    if tensor.size != offsets[1] - offsets[0]:
        raise _damaged(path, f"{name} takes {offsets[1] - offsets[0]} bytes and its shape asks for {tensor.size}")
    return tensor


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _weight_map(path: Path) -> dict[str, str]:
    try:
        place = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{path} is not an index of shards; fetch it again") from error
    # A name with a folder in it would read and write elsewhere.
    if not isinstance(place, dict) or not all(
        isinstance(name, str) and is_file_name(name) and name.endswith(".safetensors") for name in place.values()
    ):
        raise ModelError(f"{path} names shards that are no safetensors files of this folder")
    return place


def _no_weights(folder: Path) -> str:
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        return (
            f"model {folder} holds pickled weights ({pickled[0]}), which are not streamed; convert them: "
            "AutoModelForCausalLM.from_pretrained(FOLDER, dtype='auto').save_pretrained(NEW_FOLDER)"
        )
    return f"model {folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}"


def _damaged(path: Path, why: str) -> ModelError:
    return ModelError(f"{path} is damaged or cut off: {why}; fetch or save it again")
