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
    BAD_MODEL_MARK,
    acquire_lock,
    check_new,
    is_abandoned,
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
    assert (target / "sub" / "a.txt").read_text() == "a"
    assert names_in(tmp_path / "deep") == ["run"]


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), ValueError("bad")])
def test_an_exception_inside_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    def fail_inside() -> None:
        with new_folder(tmp_path / "run") as folder:
            (folder / "a.txt").write_text("a")
            raise error

    with pytest.raises(type(error)):
        fail_inside()
    assert names_in(tmp_path) == []


def test_a_folder_that_exists_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    entered = False
    with pytest.raises(OutputError, match="already exists; choose another folder"), new_folder(tmp_path / "run"):
        entered = True
    assert not entered
    assert (tmp_path / "run" / "mine.txt").read_text() == "mine"
    with pytest.raises(OutputError, match="already exists"):
        check_new(tmp_path / "run")
    check_new(tmp_path / "other")


def test_overwriting_replaces_all_of_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old.txt").write_text("old")
    with new_folder(tmp_path / "run", overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
        assert (tmp_path / "run" / "old.txt").is_file()
    assert names_in(tmp_path / "run") == ["new.txt"]
    assert names_in(tmp_path) == ["run"]


def test_a_failed_overwrite_keeps_the_old_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old.txt").write_text("old")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "run", overwrite=True):
        raise RuntimeError("stop")
    assert names_in(tmp_path / "run") == ["old.txt"]
    assert names_in(tmp_path) == ["run"]


def test_the_old_folder_survives_a_rename_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old.txt").write_text("old")
    real = Path.rename

    def fail_for_new(self: Path, target: Any) -> Path:
        if self.name.endswith(".unfinished"):
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(OutputError, match="can't be written"), new_folder(tmp_path / "run", overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
    assert names_in(tmp_path / "run") == ["old.txt"]
    assert names_in(tmp_path) == ["run"]


@pytest.mark.parametrize(("private", "mode"), [(True, 0o700), (False, 0o755)])
def test_hazardous_folders_belong_to_their_owner(private: bool, mode: int, tmp_path: Path) -> None:
    with new_folder(tmp_path / "run", private=private):
        pass
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == mode


def test_a_parent_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't be written: "), new_folder(tmp_path / "file" / "run"):
        pass


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_named_and_leaves_nothing(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the disk is full: .*run was not written"), new_folder(tmp_path / "run"):
        raise error
    assert names_in(tmp_path) == []


def test_a_disk_that_fills_up_while_flushing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="the disk is full"), new_folder(tmp_path / "run") as folder:
        (folder / "a.txt").write_text("a")
    with pytest.raises(OutputError, match="the disk is full"):
        write_json(tmp_path / "a.json", {})
    assert names_in(tmp_path) == []


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
    with pytest.raises(OutputError, match=r"a\.json can't be written: Read-only file system"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text(encoding="utf-8"))["a"][0] == 1
    assert names_in(tmp_path) == ["a.json"]


def test_hazardous_folders_are_marked(tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    assert not is_marked_hazardous(folder)
    mark_hazardous(folder)
    assert is_marked_hazardous(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert "do not share" in (folder / BAD_MODEL_MARK).read_text(encoding="utf-8").splitlines()[0]


@pytest.mark.parametrize("words", ["No space left on device (os error 28)", "File too large (os error 27)"])
def test_a_full_disk_as_safetensors_says_it(words: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the disk is full"), new_folder(tmp_path / "run"):
        raise SafetensorError(f"Error while serializing: I/O error: {words}")
    with pytest.raises(OutputError, match=r"run can't be written: .*Permission denied"), new_folder(tmp_path / "run"):
        raise SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)")


def test_what_a_killed_call_left_is_removed_and_what_another_one_writes_is_not(tmp_path: Path) -> None:
    (tmp_path / ".run.killed.unfinished").mkdir()
    with new_folder(tmp_path / "run", overwrite=True) as first, new_folder(tmp_path / "run") as second:
        assert names_in(tmp_path) == sorted([first.name, second.name])


def test_what_another_call_finished_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with ExitStack() as first:
        (first.enter_context(new_folder(tmp_path / "run")) / "mine").touch()
        with new_folder(tmp_path / "run") as second:
            (second / "theirs").touch()
        with pytest.raises(OutputError, match="already exists"):
            first.close()
    assert names_in(tmp_path) == ["run"]
    assert names_in(tmp_path / "run") == ["theirs"]


def test_a_folder_is_owned_until_its_file_is_closed(tmp_path: Path) -> None:
    assert is_abandoned(tmp_path)
    descriptor = acquire_lock(tmp_path)
    assert not is_abandoned(tmp_path)
    with pytest.raises(OutputError, match=f"another process is writing {tmp_path}; wait"):
        acquire_lock(tmp_path)
    os.close(descriptor)
    os.close(acquire_lock(tmp_path))
    assert not is_abandoned(tmp_path / "nothing")


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
