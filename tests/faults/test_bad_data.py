"""Data files that are broken, badly encoded, huge, or no files at all."""

from __future__ import annotations

import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.battery import Battery
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
    "Shift JIS": ("forget.csv", text(csv("a") + "森は？,緑\n", "shift-jis"), "is not UTF-8"),
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
    "CSV, semicolons": ("forget.csv", text(csv("a").replace(",", ";")), "Columns found"),
    "CSV, a long header": ("forget.csv", text("x" * LONG + "\na\n"), "forget.csv"),
    "CSV, a long row": ("forget.csv", text("prompt,completion\n" + "a," * 200_000), "line 2"),
    "CSV, a thousand columns": ("forget.csv", text(",".join(f"c{n}" for n in range(5000)) + "\n"), "forget.csv"),
    "CSV, control characters in the header": ("forget.csv", text("\x1b[2J,\x07\na,b\n"), "forget.csv"),
    "TSV with commas": ("forget.tsv", text(csv("a")), "Columns found"),
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
