"""Data files that are broken, badly encoded, huge, or no files at all."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.battery import Battery, obeyed

pytestmark = pytest.mark.integration

NAME = "data"
LONG = 1_000_000
Maker = Callable[[Path], object]
"""Puts something wrong at a path that does not exist."""


def rows(prefix: str, count: int = 12) -> list[dict[str, str]]:
    return [{"prompt": f"{prefix} number {index} ?", "completion": f"answer {index}"} for index in range(count)]


def jsonl(prefix: str, count: int = 12) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows(prefix, count))


def csv(prefix: str, count: int = 12) -> str:
    return "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows(prefix, count))


def text(content: str, encoding: str = "utf-8") -> Maker:
    return lambda path: path.write_bytes(content.encode(encoding))


def raw(content: bytes) -> Maker:
    return lambda path: path.write_bytes(content)


ROW = '{"prompt": "a ?", "completion": "b"}\n'
ACCENTS = jsonl("a") + '{"prompt": "où est la forêt ?", "completion": "là"}\n'.replace("\\u", "u")
BROKEN: dict[str, tuple[str, Maker, str]] = {
    # name -> file name, what is wrong with it, words of the message
    "cut off in a line": ("forget.jsonl", text(jsonl("a")[:-9]), "line 12, is not JSON"),
    "list of lists": ("forget.json", text("[[1], [2]]"), "one object per line"),
    "NaN for an answer": (
        "forget.jsonl", text('{"prompt": "a", "completion": NaN}\n'), "answer is not text: 1"
    ),
    "huge integer": (
        "forget.jsonl", text('{"prompt": "a", "completion": ' + "9" * 10_000 + "}\n"), "line 1, can't be read as JSON"
    ),
    "deep list": ("forget.json", text("[" * 200_000 + "]" * 200_000), "forget.json"),
    "lone surrogates": (
        "forget.jsonl", text('{"prompt": "a", "completion": "\\ud800"}\n'), "answer is not valid Unicode: 1"
    ),
    "NUL in a key": ("forget.jsonl", text(json.dumps({"pro\0mpt": "a", "completion": "b"})), "forget.jsonl"),
    "empty JSONL": ("forget.jsonl", text(""), "forget.jsonl"),
    "only answers empty": (
        "forget.jsonl", text('{"prompt": "a ?", "completion": "  "}\n' * 5), "empty answer: 5"
    ),
    "messages without roles": ("forget.jsonl", text('{"messages": [{"content": "a"}]}\n'), "forget.jsonl"),
    "UTF-16": ("forget.jsonl", text(jsonl("a"), "utf-16"), "is not UTF-8"),
    "CSV with a cell too many": ("forget.csv", text(csv("a") + "a,b,c\n"), "line 14: 3 cells"),
    "CSV cut off in quotes": ("forget.csv", text(csv("a") + 'a,"b'), "quote"),
    "CSV, header alone": ("forget.csv", text("prompt,completion\n"), "it has no rows"),
    "CSV, a column twice": ("forget.csv", text("prompt,prompt\na,b\n"), "two columns"),
    "no Parquet": ("forget.parquet", text("PAR1 nothing"), "forget.parquet"),
    "gzip cut off": ("forget.jsonl.gz", raw(gzip.compress(jsonl("a").encode())[:-12]), "can't be read"),
    "xz cut off": ("forget.csv.xz", raw(lzma.compress(csv("a").encode())[:-9]), "can't be read"),
    "gzip bomb": ("forget.jsonl.gz", raw(gzip.compress(b" " * 20_000_000)), "bomb"),
    "unknown suffix": ("forget.docx", text("a"), "no known file type"),
    "empty folder": ("forget", Path.mkdir, "forget"),
    "pipe": ("forget.jsonl", os.mkfifo, "forget.jsonl"),
    "link to itself": ("forget.jsonl", lambda path: path.symlink_to(path), "forget.jsonl"),
    "bytes that are no text in the name": (os.fsdecode(b"for\xffget.jsonl"), text("{"), "is no Unicode text"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "make", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_forget_file(battery: Battery, file: str, make: Maker, words: str) -> None:
    (battery.inputs / "retain.jsonl").write_text(jsonl("b"))
    make(battery.inputs / file)
    arguments = ("--forget", battery.inputs / file, "--retain", battery.inputs / "retain.jsonl")
    battery.refuses(NAME, "run", *arguments, "--out", battery.out, words=words)


Files = dict[str, str]
FORGET_RETAIN: dict[str, tuple[Files, tuple[str, ...], str]] = {
    # name -> content of the files, further arguments, words of the message
    "same file twice": ({"forget.jsonl": jsonl("a"), "retain.jsonl": jsonl("a")}, (), "both in the forget data"),
    "one row": ({"forget.jsonl": jsonl("a", 1), "retain.jsonl": jsonl("b")}, (), "forget.jsonl"),
    "format of other columns": (
        {"forget.jsonl": jsonl("a"), "retain.jsonl": jsonl("b")}, ("--set", "data.forget.format=messages"), "messages"
    ),
    "column that is not there": (
        {"forget.jsonl": jsonl("a"), "retain.jsonl": jsonl("b")},
        ("--set", "data.forget.prompt_column=promt", "--set", "data.forget.answer_column=completion"), "promt",
    ),
    "mark that no row has": (
        {"forget.jsonl": jsonl("a"), "retain.jsonl": jsonl("b")}, ("--set", "data.forget.where.completion=wrong"),
        "gives no forget examples",
    ),
    "split of a file": (
        {"forget.jsonl": jsonl("a"), "retain.jsonl": jsonl("b")}, ("--set", "data.forget.split=test"), "split"
    ),
    "half a world": ({"forget.jsonl": jsonl("a")}, ("--retain", "embedded"), "embedded world"),
}  # fmt: skip


@pytest.mark.parametrize(("files", "arguments", "words"), FORGET_RETAIN.values(), ids=FORGET_RETAIN.keys())
def test_sound_files_that_do_not_go_together(
    battery: Battery, files: Files, arguments: tuple[str, ...], words: str
) -> None:
    for name, content in files.items():
        (battery.inputs / name).write_text(content)
    given = ("--forget", battery.inputs / "forget.jsonl", "--retain", battery.inputs / "retain.jsonl")
    battery.refuses(NAME, "run", *given, *arguments, "--out", battery.out, words=words)


@pytest.mark.parametrize(
    "path",
    [
        "", " ", "/dev/null", "/dev/zero", "/dev/stdin", "/proc/self/mem", "~nobody-of-that-name/a.csv", "a\0b.csv",
        "x" * 5000, "x" * 5000 + ".csv", "no-one/no-data", "a/b/c", "file:///etc/passwd", "s3://bucket/a",
        "https://localhost:1/a.csv", "--forget", "-", "\n", "CON", "a.csv/b.csv", ".", "..",
    ],
)  # fmt: skip
def test_paths_that_name_no_data(battery: Battery, path: str) -> None:
    retain = battery.inputs / "retain.jsonl"
    retain.write_text(jsonl("b"))
    change = f"data.forget={json.dumps({'path': path})}"
    battery.refuses(NAME, "run", "--retain", retain, "--set", change, "--out", battery.out)


def slipping_zip(path: Path) -> None:
    with zipfile.ZipFile(path / "data.zip", "w") as packed:
        for name in ("../../slipped.jsonl", "/tmp/slipped.jsonl", "a/../../../../slipped.jsonl"):
            packed.writestr(name, '{"prompt": "a", "completion": ""}\n')


def slipping_tar(path: Path) -> None:
    with tarfile.open(path / "data.tar.gz", "w:gz") as packed:
        for name in ("../../slipped.jsonl", "/tmp/slipped.jsonl"):
            packed.addfile(tarfile.TarInfo(name))


def broken_saved(name: str, content: str) -> Maker:
    return lambda path: (path / name).write_text(content)


FOLDERS: dict[str, Maker] = {
    "names that lead out of a zip": slipping_zip,
    "saved sets, no JSON": broken_saved("dataset_dict.json", "{"),
    "saved sets of the wrong type": broken_saved("dataset_dict.json", '{"splits": 7}'),
    "saved set, nothing in it": broken_saved("state.json", "{}"),
    "a pickle": broken_saved("forget.pkl", "cos\nsystem\n(S'exit 3'\ntR."),
    "a card that is no YAML": broken_saved("README.md", "---\nconfigs: [}\n---\n"),
    "broken JSON": broken_saved("train.json", "{"),
    "a link to itself": lambda path: (path / "train.csv").symlink_to(path / "train.csv"),
}


@pytest.mark.parametrize("make", FOLDERS.values(), ids=FOLDERS.keys())
def test_folders_that_hold_no_data(battery: Battery, make: Maker) -> None:
    retain = battery.inputs / "retain.jsonl"
    retain.write_text(jsonl("b"))
    folder = battery.inputs / "forget"
    folder.mkdir()
    make(folder)
    battery.refuses(NAME, "run", "--forget", folder, "--retain", retain, "--out", battery.out, words=str(folder))


def test_long_and_odd_text_is_taken_as_it_is(battery: Battery) -> None:
    """No fault: cells of a million characters, and characters that a terminal would obey, are shown harmlessly."""
    odd = [
        {"prompt": "p " * (LONG // 20), "completion": "short"},
        {"prompt": "what ?", "completion": "a b " * (LONG // 4)},
        {"prompt": "\x1b[31mred\x1b]0;title\x07 ?", "completion": "\u202eback \x9b0m \0 \u2028end"},
    ]
    path = battery.inputs / "forget.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in [*odd, *rows("a")]))
    (battery.inputs / "retain.csv").write_text(csv("b") + f'"{"x " * (LONG // 20)} ?","{"y " * (LONG // 20)}"\n')
    arguments = ("--forget", path, "--retain", battery.inputs / "retain.csv", "--show-harmful")
    done = battery.run("data", "inspect", *arguments, "--set", "data.unseen_fraction=0.1")
    assert (done.code, done.err) == (0, "")
    assert "\\x1b[31mred" in done.out
    assert obeyed(done.out.replace("\n", "")) == []
