"""From paths, memory and the hub to rows: cells as they are written, read anew each time and without a trace."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from huggingface_hub import HfApi
from huggingface_hub import errors as hub_errors

from sku.config import SourceConfig
from sku.data.read import load_prompts
from sku.data.tables import Table, held_rows, read_table
from sku.errors import DataError

ROWS = [{"prompt": "q1", "response": "None", "is_safe": False}, {"prompt": "q2", "response": "12", "is_safe": True}]


def read(path: Path | str, **settings: Any) -> Table:
    return read_table(SourceConfig(path=str(path), **settings))


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def cells(path: Path) -> list[tuple[object, ...]]:
    return [tuple(row.values()) for row in read(path).rows]


TEXT_FILES: list[tuple[str, Any, Any]] = [
    # Name, content and rows. Nothing is guessed: no number, no null, no time.
    (
        "a.csv",
        '\ufeffquestion,answer\r\n1,None\r\n007,123\r\nNaN,1.50\r\n"a, b","c\r\nd ""e"""\r\n\r\ntrue,\r\n',
        [("1", "None"), ("007", "123"), ("NaN", "1.50"), ("a, b", 'c\r\nd "e"'), ("true", "")],
    ),
    # As Excel writes it where a comma is the sign of decimals; quoted cells hold both signs and a line end.
    (
        "excel.csv",
        '\ufeffFrage;Antwort\r\n"Wie viel ist 1,5; 2,5?";4,0\r\n"Zwei\nZeilen, ja";"er sagte ""nein"""\r\n',
        [("Wie viel ist 1,5; 2,5?", "4,0"), ("Zwei\nZeilen, ja", 'er sagte "nein"')],
    ),
    ("tabs.csv", "q\ta\nis it 1, 2; or 3 ?\tno, none\n", [("is it 1, 2; or 3 ?", "no, none")]),
    *(
        (name, content, [("007", "2020-01-01", None), ("x\u2028y", None, {"d": True})])
        for name in ("a.json", "a.jsonl")
        for content in (
            '{"q": "007", "a": "2020-01-01"}\n\n{"q": "x\u2028y", "c": {"d": true}}\n',
            '\ufeff[{"q": "007", "a": "2020-01-01"},\n {"q": "x\u2028y", "c": {"d": true}}]',
        )
    ),
]


@pytest.mark.parametrize(("name", "content", "rows"), TEXT_FILES)
def test_cells_stay_as_they_are_written(
    tmp_path: Path, name: str, content: str | bytes, rows: list[tuple[object, ...]]
) -> None:
    assert cells(write(tmp_path, name, content)) == rows


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "q,a\n1,2\n3\n", "line 3: 1 cells"),
        ("a.csv", 'q,a\n1,"2\n3,4\n', "line 3"),
        ("a.csv", "\n", "is empty"),
        ("a.csv", "q,a,Q\n1,2,3\n", "'Q'"),
        ("a.csv", "q,a\n1,\u00e9\n".encode("latin-1"), "UTF-8"),
        ("a.jsonl", '{"q": 1}\n{"q": 2}\n{"q": "thr', "line 3"),
        ("a.jsonl", '{"q": 1}\n"text"\n', "line 2"),
        ("a.xlsx", "x", "a.xlsx"),
        ("a.parquet", "no parquet", "a.parquet can't be read"),
    ],
)
def test_broken_files_name_file_and_line(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(DataError, match=words) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_csv_with_huge_cells_and_nul_bytes(tmp_path: Path) -> None:
    huge = "word " * 200_000
    assert cells(write(tmp_path, "a.csv", f"q,a\nx\0y,{huge}\n")) == [("x\0y", huge)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as a hub repository is laid out."""
    made = tmp_path / "repository"
    made.mkdir()
    (made / "train.jsonl").write_text('{"q": "one"}\n{"q": "two"}\n')
    (made / "test.jsonl").write_text('{"q": "three"}\n')
    return made


def make(rows: list[dict[str, Any]] = ROWS) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows)


def test_parquet_folders_and_saved_datasets(tmp_path: Path, folder: Path) -> None:
    make().to_parquet(tmp_path / "a.parquet")
    table = read(tmp_path / "a.parquet", split="train")
    assert (list(table.columns), list(table.rows), table.revision) == (["prompt", "response", "is_safe"], ROWS, None)
    assert cells(folder) == [("one",), ("two",)]
    assert [row["q"] for row in read(folder, split="test").rows] == ["three"]
    make().save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": make(), "test": make(ROWS[1:])}).save_to_disk(tmp_path / "several")
    assert list(read(tmp_path / "one").rows) == list(read(tmp_path / "several").rows) == ROWS
    assert list(read(tmp_path / "several", split="test").rows) == ROWS[1:]
    write(tmp_path, "a.csv", "q\n1\n")
    for name, settings, words in (
        ("repository", {"split": "dev"}, "repository can't be read: .*dev"),
        ("repository", {"revision": "main"}, "revision is 'main'"),
        ("several", {"split": "dev"}, "train, test"),
        ("one", {"split": "test"}, "split is 'test'"),
        *(("a.csv", {key: "x"}, f"{key} is 'x'") for key in ("revision", "config_name", "split")),
    ):
        with pytest.raises(DataError, match=words):
            read(tmp_path / name, **settings)
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="one can't be read"):
        read(tmp_path / "one")


def test_a_changed_file_is_read_anew_even_with_the_same_time(tmp_path: Path, folder: Path) -> None:
    for path, named in ((tmp_path / "a.parquet", tmp_path / "a.parquet"), (folder / "train.jsonl", folder)):
        for word in ("old", "new"):
            before = path.stat() if path.exists() else None
            table = make([{"q": word}])
            table.to_parquet(path) if path.suffix == ".parquet" else table.to_json(path)
            if before is not None:
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            assert cells(named) == [(word,)]


def test_reading_leaves_no_copy(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    make().to_parquet(tmp_path / "a.parquet")
    read(tmp_path / "a.parquet")
    read(folder)
    (folder / "train.jsonl").write_text('{"q": "one"}\n{"q": ')
    with pytest.raises(DataError, match=r"repository can't be read: .*JSON parse error"):
        read(folder)
    assert not (tmp_path / "cache").exists()
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("path", ["missing/a.csv", "nul\0byte", "~no-such-user/a.csv", "", "/dev/null"])
def test_missing_paths(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="there is no file or folder") as caught:
        read(path)
    assert path in str(caught.value)


def test_prompts_that_ship_with_the_package() -> None:
    for name, count in (("normal", 352), ("borderline", 668)):
        found = load_prompts(SourceConfig(path=f"sku:{name}"), "retain", "data.retain", seed=0)
        assert len(found.prompts) == len(read(f"sku:{name}").rows) == count
    with pytest.raises(DataError, match=r"sku:norml .* normal\? .*borderline"):
        read("sku:norml")
    with pytest.raises(DataError, match="split is 'test', but sku:normal"):
        read("sku:normal", split="test")


def test_rows_in_memory() -> None:
    table = held_rows([{"prompt": "a"}, {"prompt": "b", "response": "c"}]).table
    assert (list(table.columns), list(table.rows)) == (
        ["prompt", "response"], [{"prompt": "a", "response": None}, {"prompt": "b", "response": "c"}],
    )  # fmt: skip
    for rows, words in (
        (datasets.DatasetDict(train=make()), "DatasetDict of 1 splits"),
        (make().to_iterable_dataset(), "IterableDataset"),
        ([*ROWS, "how ?"], "row 2 of the data is a str"),
        (7, "data is a int"),
    ):
        with pytest.raises(DataError, match=words):
            held_rows(rows)


COMMIT, OTHER = "a" * 40, "b" * 40
ID = "someone/things"
OFFLINE = hub_errors.OfflineModeIsEnabled("offline mode is enabled")
NO_ROUTE = hub_errors.HfHubHTTPError.__mro__[1]("no route")


def hub(
    monkeypatch: pytest.MonkeyPatch, folder: Path, answer: str | BaseException, copy: str | None
) -> list[dict[str, Any]]:
    """Replaces the hub's answer, and ``datasets`` by a copy of a commit; the list gets the arguments of each call."""
    asked: list[dict[str, Any]] = []
    rows = make([{"question": "q", "answer": "a"}])
    if copy is not None:
        place = folder / "someone___things" / "default" / "0.0.0" / copy
        rows.save_to_disk(place)
        rows = datasets.Dataset.from_file(str(next(place.glob("*.arrow"))))

    def dataset_info(self: HfApi, repo_id: str, *, revision: str | None = None) -> SimpleNamespace:
        asked.append({"repo_id": repo_id, "revision": revision})
        if isinstance(answer, BaseException):
            raise answer
        return SimpleNamespace(sha=answer)

    def load_dataset(path: str, name: str | None = None, **settings: Any) -> datasets.Dataset:
        asked.append({"path": path, "name": name, **settings})
        return rows

    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_branch_is_pinned_to_the_commit_it_resolved_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = hub(monkeypatch, tmp_path, COMMIT, COMMIT)
    table = read(ID, revision="main", config_name="generation", split="validation")
    assert (table.revision, list(table.columns)) == (COMMIT, ["question", "answer"])
    assert asked == [
        {"repo_id": ID, "revision": "main"},
        {"path": ID, "name": "generation", "revision": COMMIT, "split": "validation"},
    ]


@pytest.mark.parametrize("failure", [OFFLINE, NO_ROUTE])
def test_offline_takes_the_copy_of_the_right_commit(
    failure: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a hub, ``datasets`` takes the newest copy on the machine, whatever revision was asked for."""
    asked = hub(monkeypatch, tmp_path, failure, COMMIT)
    assert read(ID).revision == read(ID, revision=COMMIT).revision == COMMIT
    assert [call["revision"] for call in asked] == [None, None, COMMIT, COMMIT]
    with pytest.raises(DataError, match=f"asked for at {OTHER}, .* this machine holds {COMMIT}"):
        read(ID, revision=OTHER)
    with pytest.raises(DataError, match="someone/things was asked for at v1"):
        read(ID, revision="v1")
    hub(monkeypatch, tmp_path, failure, None)
    with pytest.raises(DataError, match="someone/things .* an unknown commit"):
        read(ID)


def test_an_error_of_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub(monkeypatch, tmp_path, hub_errors.HFValidationError("500 Server\nError"), None)
    with pytest.raises(DataError, match="someone/things.*v9.*500 Server Error"):
        read(ID, revision="v9")
