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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
    "cut off behind a key": ("forget.jsonl", text(jsonl("a") + '{"prompt":'), "line 13, is not JSON"),
    "cut off in a character": (
        "forget.jsonl", raw(jsonl("a").encode() + '{"prompt": "où'.encode()[:-1]), "is not UTF-8"
    ),
    "list cut off": ("forget.json", text(json.dumps(rows("a"))[:-1]), "is not JSON"),
    "list of lists": ("forget.json", text("[[1], [2]]"), "one object per line"),
    "two lists": ("forget.json", text("[{}]\n[{}]\n"), "is not JSON"),
    "object of lists": ("forget.json", text('{"prompt": ["a"],\n "completion": ["b"]}'), "is not JSON"),
    "number": ("forget.json", text("7"), "one object per line"),
    "null": ("forget.jsonl", text("null\n"), "one object per line"),
    "strings": ("forget.jsonl", text('"a"\n"b"\n'), "one object per line"),
    "single quotes": ("forget.jsonl", text("{'prompt': 'a'}\n"), "line 1, is not JSON"),
    "comments": ("forget.jsonl", text("// mine\n" + jsonl("a")), "line 1, is not JSON"),
    "YAML": ("forget.json", text("- prompt: a\n"), "is not JSON"),
    "NaN alone": ("forget.jsonl", text("NaN\n"), "one object per line"),
    "NaN for an answer": (
        "forget.jsonl", text('{"prompt": "a", "completion": NaN}\n'), "answer is not text: 1"
    ),
    "infinity for a prompt": (
        "forget.jsonl", text('{"prompt": -Infinity, "completion": "b"}\n'), "prompt is not text: 1"
    ),
    "huge integer": (
        "forget.jsonl", text('{"prompt": "a", "completion": ' + "9" * 10_000 + "}\n"), "line 1, can't be read as JSON"
    ),
    "long integer": ("forget.jsonl", text('{"prompt": "a", "completion": ' + "9" * 400 + "}\n"), "is not text: 1"),
    "deep list": ("forget.json", text("[" * 200_000 + "]" * 200_000), "forget.json"),
    "deep object": ("forget.jsonl", text('{"a":' * 200_000 + "1" + "}" * 200_000), "forget.jsonl"),
    "deep answer": (
        "forget.jsonl", text('{"prompt": "a", "completion": ' + "[" * 500 + "]" * 500 + "}\n"), "a list of messages"
    ),
    "lone surrogates": (
        "forget.jsonl", text('{"prompt": "a", "completion": "\\ud800"}\n'), "answer is not valid Unicode: 1"
    ),
    "one long line": ("forget.jsonl", text("x" * LONG), "line 1, is not JSON"),
    "long key": ("forget.jsonl", text(json.dumps({"x" * LONG: "a"})), "forget.jsonl"),
    "thousand keys": ("forget.jsonl", text(json.dumps({f"key{n}": "a" for n in range(5000)})), "forget.jsonl"),
    "NUL bytes": ("forget.jsonl", raw(b"\x00" * 5000), "forget.jsonl"),
    "NUL in a line": ("forget.jsonl", raw(ROW.encode() + b'{"prompt": "a\x00b", "completion": "b"}\n'), "line 2"),
    "NUL in a key": ("forget.jsonl", text(json.dumps({"pro\0mpt": "a", "completion": "b"})), "forget.jsonl"),
    "control characters in keys": (
        "forget.jsonl", text(json.dumps({"\x1b[31mred\x07": "a", "line\nbreak": "b", "\u202etxt": "c"})), "forget"
    ),
    "empty JSONL": ("forget.jsonl", text(""), "forget.jsonl"),
    "blank JSONL": ("forget.jsonl", text("\n \n\t\n"), "forget.jsonl"),
    "empty list": ("forget.json", text("[]"), "forget.json"),
    "empty objects": ("forget.jsonl", text("{}\n{}\n"), "forget.jsonl"),
    "only answers empty": (
        "forget.jsonl", text('{"prompt": "a ?", "completion": "  "}\n' * 5), "empty answer: 5"
    ),
    "only prompts null": (
        "forget.jsonl", text('{"prompt": null, "completion": "b"}\n' * 5), "empty prompt: 5"
    ),
    "prompts of the wrong type": (
        "forget.jsonl", text('{"prompt": {"text": "a"}, "completion": "b"}\n' * 5), "prompt is not text: 5"
    ),
    "prompts that are lists": (
        "forget.jsonl", text('{"prompt": ["a", "b"], "completion": "b"}\n' * 5), "forget.jsonl"
    ),
    "messages that are text": ("forget.jsonl", text('{"messages": "a"}\n'), "forget.jsonl"),
    "messages without roles": ("forget.jsonl", text('{"messages": [{"content": "a"}]}\n'), "forget.jsonl"),
    "messages with odd roles": (
        "forget.jsonl",
        text('{"messages": [{"role": ["user"], "content": 1}, {"role": {}, "content": null}]}\n'),
        "forget.jsonl",
    ),
    "UTF-16": ("forget.jsonl", text(jsonl("a"), "utf-16"), "is not UTF-8"),
    "UTF-16 without a mark": ("forget.jsonl", text(ACCENTS, "utf-16-le"), "forget.jsonl"),
    "UTF-32": ("forget.csv", text(csv("a"), "utf-32"), "is not UTF-8"),
    "Latin-1": ("forget.jsonl", text(ACCENTS, "latin-1"), "is not UTF-8"),
    "Shift JIS": ("forget.csv", text(csv("a") + "森,緑\n", "shift-jis"), "is not UTF-8"),
    "gzip under the name of JSONL": ("forget.jsonl", raw(gzip.compress(jsonl("a").encode())), "is not UTF-8"),
    "two byte order marks": ("forget.jsonl", text("\ufeff\ufeff" + jsonl("a")), "line 1, is not JSON"),
    "CSV with NUL bytes": ("forget.csv", raw(b"prompt,completion\na\x00b,\x00\n"), "forget.csv"),
    "CSV of NUL bytes": ("forget.csv", raw(b"\x00" * 5000), "forget.csv"),
    "CSV with a cell too many": ("forget.csv", text(csv("a") + "a,b,c\n"), "line 14: 3 cells"),
    "CSV with a cell too few": ("forget.csv", text("prompt,completion\na\n"), "line 2: 1 cells"),
    "CSV cut off in quotes": ("forget.csv", text(csv("a") + 'a,"b'), "quote"),
    "CSV with a quote inside": ("forget.csv", text(csv("a") + '"a"x,b\n'), "line 14"),
    "CSV, header alone": ("forget.csv", text("prompt,completion\n"), "it has no rows"),
    "CSV, empty": ("forget.csv", text(""), "is empty"),
    "CSV, blank lines": ("forget.csv", text("\n\n\n"), "is empty"),
    "CSV, no header": ("forget.csv", text("what ?,nothing\nwho ?,nobody\n"), "Columns found"),
    "CSV, a column twice": ("forget.csv", text("prompt,prompt\na,b\n"), "two columns"),
    "CSV, a column missing": ("forget.csv", text("prompt,text\na,b\n"), "Columns found"),
    "CSV, bars": ("forget.csv", text(csv("a").replace(",", "|")), "Columns found"),
    "CSV, a long header": ("forget.csv", text("x" * LONG + "\na\n"), "forget.csv"),
    "CSV, a long row": ("forget.csv", text("prompt,completion\n" + "a," * 200_000), "line 2"),
    "CSV, a thousand columns": ("forget.csv", text(",".join(f"c{n}" for n in range(5000)) + "\n"), "forget.csv"),
    "CSV, control characters in the header": ("forget.csv", text("\x1b[2J,\x07\na,b\n"), "forget.csv"),
    "TSV with bars": ("forget.tsv", text(csv("a").replace(",", "|")), "Columns found"),
    "CSV, answers empty": ("forget.csv", text("prompt,completion\n" + "a ?,\n" * 4), "empty answer: 4"),
    "no Parquet": ("forget.parquet", text("PAR1 nothing"), "forget.parquet"),
    "empty Parquet": ("forget.parquet", raw(b""), "forget.parquet"),
    "Parquet of marks": ("forget.parquet", raw(b"PAR1" + b"\xff" * 64 + b"\xff\xff\xff\x7f" + b"PAR1"), "forget"),
    "no gzip": ("forget.jsonl.gz", text(jsonl("a")), "can't be read"),
    "gzip cut off": ("forget.jsonl.gz", raw(gzip.compress(jsonl("a").encode())[:-12]), "can't be read"),
    "gzip with a wrong sum": (
        "forget.jsonl.gz",
        raw(gzip.compress(jsonl("a").encode(), mtime=0)[:-8] + b"\0" * 8),
        "can't be read",
    ),
    "gzip of noise": ("forget.csv.gz", raw(gzip.compress(b"a,b\n", mtime=0)[:10] + b"\xff" * 40), "can't be read"),
    "no xz": ("forget.jsonl.xz", text("nothing"), "can't be read"),
    "xz cut off": ("forget.csv.xz", raw(lzma.compress(csv("a").encode())[:-9]), "can't be read"),
    "empty gzip": ("forget.csv.gz", raw(b""), "forget.csv.gz"),
    "gzip bomb": ("forget.jsonl.gz", raw(gzip.compress(b" " * 20_000_000)), "bomb"),
    "unknown suffix": ("forget.docx", text("a"), "no known file type"),
    "no suffix": ("forget", text(jsonl("a")), "no known file type"),
    "hidden": (".jsonl", text(jsonl("a")), "no known file type"),
    "zip": ("forget.zip", raw(b"PK\x03\x04"), "no known file type"),
    "folder with the name of a file": ("forget.jsonl", Path.mkdir, "forget.jsonl"),
    "empty folder": ("forget", Path.mkdir, "forget"),
    "pipe": ("forget.jsonl", os.mkfifo, "forget.jsonl"),
    "link to itself": ("forget.jsonl", lambda path: path.symlink_to(path), "forget.jsonl"),
    "link to nothing": ("forget.jsonl", lambda path: path.symlink_to("nowhere.jsonl"), "forget.jsonl"),
    "missing": ("forget.jsonl", lambda path: None, "no file or folder"),
    "line break in the name": ("for\nget.jsonl", text("{"), "get.jsonl"),
    "control characters in the name": ("for\x1b[31m\x07get.jsonl", text("{"), "get.jsonl"),
    "reversed text in the name": ("for\u202etxt.jsonl", text("{"), "txt.jsonl"),
    "bytes that are no text in the name": (os.fsdecode(b"for\xffget.jsonl"), text("{"), "is no Unicode text"),
    "xz bomb": ("forget.csv.xz", raw(lzma.compress(b"a,b\n" + b"\n" * 20_000_000, preset=0)), "bomb"),
    "spaces in the name": ("  .jsonl", text("{"), ".jsonl"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "make", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_forget_file(battery: Battery, file: str, make: Maker, words: str) -> None:
    (battery.inputs / "retain.jsonl").write_text(jsonl("b"))
    make(battery.inputs / file)
    arguments = ("--forget", battery.inputs / file, "--retain", battery.inputs / "retain.jsonl")
    battery.refuses(NAME, "run", *arguments, "--out", battery.out, words=words)


@pytest.mark.parametrize("name", ["cut off in a line", "CSV with a cell too many"])
@pytest.mark.parametrize("part", ["retain", "benign"])
def test_broken_file_of_the_other_sets(battery: Battery, part: str, name: str) -> None:
    file, make, _ = BROKEN[name]
    paths = {}
    for place, prefix in enumerate(("forget", "retain", "benign")):
        paths[prefix] = battery.inputs / f"{prefix}.jsonl"
        paths[prefix].write_text(jsonl("abc"[place]))
    paths[part].unlink()
    paths[part] = battery.inputs / file.replace("forget", part)
    make(paths[part])
    benign = ("--set", f"data.normal.own.path={paths['benign']}")
    arguments = ("run", "--forget", paths["forget"], "--retain", paths["retain"], *benign, "--out", battery.out)
    battery.refuses(NAME, *arguments, words=paths[part].name)


Files = dict[str, str]
FORGET_RETAIN: dict[str, tuple[Files, tuple[str, ...], str]] = {
    # name -> content of the files, further arguments, words of the message
    "same file twice": ({"forget.jsonl": jsonl("a"), "retain.jsonl": jsonl("a")}, (), "both in the forget data"),
    "one prompt in both, written otherwise": (
        {"forget.jsonl": jsonl("a") + '{"prompt": "  B Number 3 ?", "completion": "x"}\n', "retain.jsonl": jsonl("b")},
        (), "1 prompts are both",
    ),
    "one row": ({"forget.jsonl": jsonl("a", 1), "retain.jsonl": jsonl("b")}, (), "forget.jsonl"),
    "one prompt many times": (
        {"forget.jsonl": '{"prompt": "a ?", "completion": "b"}\n' * 50, "retain.jsonl": jsonl("b")}, (), "forget.jsonl"
    ),
    "one normal row": ({"forget.jsonl": jsonl("a"), "retain.jsonl": jsonl("b", 1)}, (), "retain.jsonl"),
    "format of other columns": (
        {"forget.jsonl": jsonl("a"), "retain.jsonl": jsonl("b")}, ("--set", "data.forget.format=messages"), "messages"
    ),
    "column that is not there": (
        {"forget.jsonl": jsonl("a"), "retain.jsonl": jsonl("b")},
        ("--set", "data.forget.prompt_column=promt", "--set", "data.forget.answer_column=completion"), "promt",
    ),
    "prompt and answer one column": (
        {"forget.jsonl": jsonl("a"), "retain.jsonl": jsonl("b")},
        ("--set", "data.forget.prompt_column=prompt", "--set", "data.forget.answer_column=prompt"), "are both prompt",
    ),
    "mark that no row has": (
        {"forget.jsonl": jsonl("a"), "retain.jsonl": jsonl("b")},
        (
            "--set", "data.forget.prompt_column=prompt", "--set", "data.forget.answer_column=completion",
            "--set", "data.forget.unsafe_column=completion", "--set", "data.forget.unsafe_value=wrong",
        ),
        "no unsafe rows",
    ),
    "split of a file": (
        {"forget.jsonl": jsonl("a"), "retain.jsonl": jsonl("b")}, ("--set", "data.forget.split=test"), "split"
    ),
    "revision of a file": (
        {"forget.jsonl": jsonl("a"), "retain.jsonl": jsonl("b")}, ("--set", "data.forget.revision=main"), "revision"
    ),
    "half a world": ({"forget.jsonl": jsonl("a")}, ("--retain", "embedded"), "embedded world"),
    "benign prompts that are forgotten": (
        {"forget.jsonl": jsonl("a"), "retain.jsonl": jsonl("b")},
        ("--set", "data.normal.own.path=../inputs/forget.jsonl"), "forget.jsonl",
    ),
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
    "names that lead out of a tar": slipping_tar,
    "saved sets, no JSON": broken_saved("dataset_dict.json", "{"),
    "saved sets that lead out": broken_saved("dataset_dict.json", '{"splits": ["../../../etc"]}'),
    "saved sets of the wrong type": broken_saved("dataset_dict.json", '{"splits": 7}'),
    "saved set, no JSON": broken_saved("state.json", "{"),
    "saved set, nothing in it": broken_saved("state.json", "{}"),
    "a script": broken_saved("forget.py", "raise SystemExit(3)"),
    "a pickle": broken_saved("forget.pkl", "cos\nsystem\n(S'exit 3'\ntR."),
    "only a card": broken_saved("README.md", "---\nconfigs: [{config_name: a, data_files: ../../*}]\n---\n"),
    "a card that is no YAML": broken_saved("README.md", "---\nconfigs: [}\n---\n"),
    "broken CSV": broken_saved("train.csv", "a,b\n1\n2,3,4\n"),
    "broken JSON": broken_saved("train.json", "{"),
    "no Arrow": broken_saved("data-00000-of-00001.arrow", "ARROW1"),
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


@st.composite
def broken_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A name and what no reader may take for data: each kind is wrong wherever hypothesis puts the fault."""
    words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=30)
    table = [{"prompt": draw(words), "completion": draw(words)} for _ in range(draw(st.integers(1, 4)))]
    lines = [json.dumps(row, ensure_ascii=draw(st.booleans())) for row in table]
    whole = "\n".join(lines).encode()
    kind = draw(st.sampled_from(["cut", "bytes", "cells", "types", "rows", "keys"]))
    if kind == "cut":  # Behind the first byte of the last line, before its last one.
        last = len(lines[-1].encode())
        return "forget.jsonl", whole[: len(whole) - draw(st.integers(1, last - 1))]
    if kind == "bytes":
        place = draw(st.integers(0, len(whole)))
        return "forget.jsonl", whole[:place] + draw(st.sampled_from([b"\xff", b"\xc0\xaf", b"\xed\xa0\x80"])) + whole[
            place:
        ]
    if kind == "cells":
        cells = draw(st.integers(0, 9).filter(lambda count: count not in (1, 2)))
        row = ",".join("x" * (cells or 1))
        return "forget.csv", f"prompt,completion\na ?,b\n{row}\n".encode()
    if kind == "types":
        values = st.none() | st.booleans() | st.integers() | st.floats() | st.lists(st.integers(), max_size=3)
        wrong = {"prompt": draw(values), "completion": draw(values)}
        return "forget.jsonl", f"{json.dumps(wrong)}\n".encode()
    if kind == "rows":
        scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.none(), min_size=1)
        return "forget.json", json.dumps([*table, draw(scalars)]).encode()
    names = st.text(max_size=40).filter(lambda name: name not in ("prompt", "completion"))
    return "forget.jsonl", json.dumps({draw(names): "a", draw(names): "b"}).encode()


@settings(
    max_examples=40, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(broken=broken_files())
def test_broken_files_of_hypothesis(battery: Battery, broken: tuple[str, bytes]) -> None:
    (battery.inputs / "retain.jsonl").write_text(jsonl("b"))
    for path in battery.inputs.glob("forget.*"):
        path.unlink()
    file, content = broken
    (battery.inputs / file).write_bytes(content)
    arguments = ("--forget", battery.inputs / file, "--retain", battery.inputs / "retain.jsonl")
    battery.refuses(NAME, "run", *arguments, "--out", battery.out, words=file)


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
