"""Folders whole or not at all, and files that are never half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from sku.errors import OutputError
from sku.storage import (
    is_marked_hazardous,
    mark_hazardous,
    new_folder,
    remove_hazardous,
    remove_left_behind,
    write_json,
)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "run"
    with new_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("a")
        assert not target.exists()
        assert folder.parent == target.parent, "on the same disk, so that the rename is one step"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, "nobody reads what is not finished"
    assert stat.S_IMODE(target.stat().st_mode) == 0o755
    with new_folder(tmp_path / "bad", private=True) as folder:
        mark_hazardous(folder)
    assert stat.S_IMODE((tmp_path / "bad").stat().st_mode) == 0o700
    assert is_marked_hazardous(tmp_path / "bad")
    assert (target / "sub" / "a.txt").read_text() == "a"
    assert names_in(tmp_path / "deep") == ["run"]


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
        (OSError(errno.ENOSPC, "No space left on device"), OutputError, "run.*the disk is full"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), OutputError, "run.*the disk is full"),
        (SafetensorError("I/O error: Permission denied (os error 13)"), OutputError, "run.*Permission denied"),
    ],
)
def test_an_exception_inside_leaves_nothing(
    error: BaseException, raised: type[BaseException], words: str, tmp_path: Path
) -> None:
    with pytest.raises(raised, match=words), new_folder(tmp_path / "run"):
        raise error
    assert names_in(tmp_path) == []


def test_what_can_not_be_made_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OutputError, match=str(target)), new_folder(target):
            pytest.fail("entered")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="run"), new_folder(tmp_path / "run") as folder:
        (folder / "a.txt").write_text("a")
    with pytest.raises(OutputError, match=r"a\.json"):
        write_json(tmp_path / "a.json", {})
    assert names_in(tmp_path) == ["file"]


def test_json_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, 2.5, None, "ä"]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1, 2.5, None, "ä"]}
    assert "ä" in path.read_text(encoding="utf-8")
    for content, kind in (({"b": object()}, TypeError), ({"b": float("nan")}, ValueError)):
        with pytest.raises(kind):
            write_json(path, content)
        assert json.loads(path.read_text(encoding="utf-8"))["a"][0] == 1
    assert names_in(tmp_path) == ["a.json"]

    def fail(self: Path, target: Any) -> Path:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OutputError, match=r"a\.json"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text(encoding="utf-8"))["a"][0] == 1
    assert names_in(tmp_path) == ["a.json"]


def test_what_a_killed_call_left_is_removed_and_what_another_one_writes_is_not(tmp_path: Path) -> None:
    (tmp_path / ".run.killed.unfinished").mkdir()
    with ExitStack() as stack:
        first = stack.enter_context(new_folder(tmp_path / "run"))
        with new_folder(tmp_path / "run") as second:
            assert names_in(tmp_path) == sorted([first.name, second.name])
        shutil.rmtree(tmp_path / "run")


def test_what_another_call_finished_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with ExitStack() as first:
        (first.enter_context(new_folder(tmp_path / "run")) / "mine").touch()
        with new_folder(tmp_path / "run") as second:
            (second / "theirs").touch()
        with pytest.raises(OutputError, match="already exists"):
            first.close()
    assert names_in(tmp_path) == ["run"]
    assert names_in(tmp_path / "run") == ["theirs"]


def test_a_removal_that_is_killed_leaves_a_marked_part_under_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark_hazardous(tmp_path / "bad")
    mark_hazardous(tmp_path / "bad" / "final")
    for folder in (tmp_path / "bad", tmp_path / "bad" / "final"):
        (folder / "model.safetensors").write_bytes(b"")

    def kill(*_arguments: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", kill)
        with pytest.raises(KeyboardInterrupt):
            remove_hazardous(tmp_path / "bad")
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".removed")
    assert all(is_marked_hazardous(path.parent) for path in left.rglob("*.safetensors"))
    assert is_marked_hazardous(left)
    remove_left_behind(tmp_path)
    assert names_in(tmp_path) == []


def test_a_removal_that_is_interrupted_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark_hazardous(tmp_path / "bad")
    (tmp_path / "bad" / "model.safetensors").write_bytes(b"")
    unlink, interrupts = Path.unlink, [KeyboardInterrupt()]

    def interrupted(path: Path, **options: Any) -> None:
        if interrupts:
            raise interrupts.pop()
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", interrupted)
    with pytest.raises(KeyboardInterrupt):
        remove_hazardous(tmp_path / "bad")
    assert names_in(tmp_path) == []
