"""Files, folders and saved datasets, read anew each time and without a trace."""

import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from sku.config import SourceConfig
from sku.data.sources.tables import Table, read_table
from sku.errors import DataError

ROWS = [{"prompt": "q1", "response": "None", "is_safe": False}, {"prompt": "q2", "response": "12", "is_safe": True}]


def read(path: Path | str, **settings: Any) -> Table:
    return read_table(SourceConfig(path=str(path), **settings))


def make() -> datasets.Dataset:
    return datasets.Dataset.from_list(ROWS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as a hub repository is laid out."""
    made = tmp_path / "repository"
    made.mkdir()
    (made / "train.jsonl").write_text('{"q": "one"}\n{"q": "two"}\n')
    (made / "test.jsonl").write_text('{"q": "three"}\n')
    return made


def test_parquet(tmp_path: Path) -> None:
    make().to_parquet(tmp_path / "a.parquet")
    table = read(tmp_path / "a.parquet")
    assert table.columns == ("prompt", "response", "is_safe")
    assert list(table.rows) == ROWS
    assert table.revision is None


def test_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("q,a\n1,None\n")
    table = read(tmp_path / "a.csv")
    assert (table.columns, list(table.rows)) == (("q", "a"), [{"q": "1", "a": "None"}])
    assert list(read(tmp_path / "a.csv", split="train").rows) == list(table.rows)


def test_folder_with_data_files(folder: Path) -> None:
    assert [row["q"] for row in read(folder).rows] == ["one", "two"]
    assert [row["q"] for row in read(folder, split="test").rows] == ["three"]
    with pytest.raises(DataError, match=r"repository can't be read: Unknown split \"dev\""):
        read(folder, split="dev")
    with pytest.raises(DataError, match="repository can't be read"):
        read(folder, config_name="other")


def test_saved_dataset_and_saved_dict(tmp_path: Path) -> None:
    make().save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": make(), "test": make().select([1])}).save_to_disk(tmp_path / "several")
    assert list(read(tmp_path / "one").rows) == ROWS
    assert list(read(tmp_path / "several").rows) == ROWS
    assert list(read(tmp_path / "several", split="test").rows) == ROWS[1:]
    with pytest.raises(DataError, match="has no split dev: set split to one of train, test"):
        read(tmp_path / "several", split="dev")
    with pytest.raises(DataError, match="split is 'test', but the saved dataset"):
        read(tmp_path / "one", split="test")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="one can't be read"):
        read(tmp_path / "one")


def test_a_changed_file_is_read_anew_even_with_the_same_time(tmp_path: Path, folder: Path) -> None:
    datasets.Dataset.from_list([{"q": "old"}]).to_parquet(tmp_path / "a.parquet")
    before = (tmp_path / "a.parquet").stat()
    assert [row["q"] for row in read(tmp_path / "a.parquet").rows] == ["old"]
    datasets.Dataset.from_list([{"q": "new"}]).to_parquet(tmp_path / "a.parquet")
    os.utime(tmp_path / "a.parquet", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert [row["q"] for row in read(tmp_path / "a.parquet").rows] == ["new"]

    before = (folder / "train.jsonl").stat()
    read(folder)
    (folder / "train.jsonl").write_text('{"q": "six"}\n{"q": "two"}\n')
    os.utime(folder / "train.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert [row["q"] for row in read(folder).rows] == ["six", "two"]


def test_reading_leaves_no_copy_and_prints_nothing(
    tmp_path: Path,
    folder: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    make().to_parquet(tmp_path / "a.parquet")
    capfd.readouterr()
    bars_disabled = datasets.are_progress_bars_disabled()
    read(tmp_path / "a.parquet")
    read(folder)
    (tmp_path / "bad.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"bad.parquet can't be read: .*Parquet"):
        read(tmp_path / "bad.parquet")
    (folder / "train.jsonl").write_text('{"q": "one"}\n{"q": ')
    with pytest.raises(DataError, match=r"repository can't be read: .*JSON parse error"):
        read(folder)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert not (tmp_path / "cache").exists()
    assert list(temporary.iterdir()) == []
    assert datasets.are_progress_bars_disabled() == bars_disabled


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing/a.csv", "there is no file or folder missing/a.csv"),
        ("missing.jsonl", "there is no file or folder missing.jsonl"),
        ("./missing", "there is no file or folder ./missing"),
        ("/missing/folder", "there is no file or folder /missing/folder"),
        ("a/b/c", "there is no file or folder a/b/c"),
        ("nul\0byte", "there is no file or folder nul"),
        ("long" * 2000, "there is no file or folder long"),
        ("~no-such-user/a.csv", "there is no file or folder ~no-such-user"),
        ("", "a data path is empty"),
    ],
)
def test_missing_paths(path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        read(path)


def test_unknown_file_types_and_settings_without_effect_are_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "a.xlsx").write_text("x")
    (tmp_path / "a.csv").write_text("q\n1\n")
    with pytest.raises(DataError, match=r"no known file type; known: .csv"):
        read(tmp_path / "a.xlsx")
    for setting in ({"revision": "main"}, {"config_name": "x"}, {"split": "test"}):
        with pytest.raises(DataError, match=f"{next(iter(setting))} is .*, but the file .* has none"):
            read(tmp_path / "a.csv", **setting)
    with pytest.raises(DataError, match="revision is 'main', but the folder"):
        read(folder, revision="main")
