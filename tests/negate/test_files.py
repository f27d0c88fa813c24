"""Headers are read strictly: a damaged file is told before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sku.errors import ModelError
from sku.negate.files import read_folder, read_layout

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.int64), "c": torch.tensor(1.5)}


def entry(start: int, end: int, dtype: Any = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, {"format": "pt"})
    layout = read_layout(path)
    content = path.read_bytes()
    assert layout.metadata == {"format": "pt"}
    assert {tensor.name for tensor in layout.tensors} == set(TENSORS)
    assert content.startswith(layout.header)
    for tensor in layout.tensors:
        part = content[tensor.start : tensor.start + tensor.size]
        read = torch.frombuffer(bytearray(part), dtype=tensor.dtype).reshape(tensor.shape)
        assert torch.equal(read, TENSORS[tensor.name])
    layout.check_unchanged()
    path.write_bytes(content + b"0")
    with pytest.raises(ModelError, match="was changed while it was read"):
        layout.check_unchanged()


@pytest.mark.parametrize(
    ("entries", "data"),
    [
        ({"a": entry(0, 4)}, b"123"),
        ({"a": entry(0, 1, dtype="F4", shape=(2,))}, b"1"),
        (b'{"a"', b""),
    ],
)
def test_damaged_files(entries: Any, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(ModelError) as caught:
        read_layout(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def sharded(folder: Path) -> dict[str, str]:
    """Two shards and their index."""
    place = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    for file in set(place.values()):
        save_file({name: TENSORS[name] for name in place if place[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    return place


def test_shards_by_their_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    files = read_folder(tmp_path)
    assert [[tensor.name for tensor in file.tensors] for file in files] == [["a"], ["b", "c"]]
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert [file.path.name for file in read_folder(tmp_path)] == ["model.safetensors"], "as transformers chooses"


def test_an_index_that_is_wrong(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    place = sharded(tmp_path)
    wrong: tuple[Any, ...] = (
        place | {"d": "one.safetensors"}, place | {"a": "two.safetensors"}, place | {"a": "../one.safetensors"}, [],
    )  # fmt: skip
    for changed in wrong:
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(ModelError, match=str(index)):
            read_folder(tmp_path)
    index.write_text(json.dumps({"weight_map": place}))
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, tmp_path / "one.safetensors")
    with pytest.raises(ModelError):
        read_folder(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(ModelError, match=r"two\.safetensors"):
        read_folder(tmp_path)
