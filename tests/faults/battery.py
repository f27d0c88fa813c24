"""A pytest plugin: wrong input through the command line, and the check that it costs one line and nothing else."""

from __future__ import annotations

import functools
import hashlib
import os
import signal
import stat
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
import typer.main

from sku.__main__ import app, main

UNLOADABLE = "../inputs/unloadable"
"""A model folder that looks like one and can't be loaded, from where a battery stands."""
SECONDS = 60
"""No wrong input may keep a command busy, or waiting, for longer."""


@dataclass(frozen=True)
class Done:
    """What a command left."""

    code: int
    out: str
    err: str


class Battery:
    """One folder for the inputs (``inputs``), one to stand in, and one for temporary files; all are watched."""

    def __init__(self, folder: Path, read: Callable[[], tuple[str, str]]) -> None:
        """Makes the folders; ``read`` gives and forgets what was printed to the two streams."""
        self._folder, self._read = folder, read
        self.inputs, self.here, self.out = folder / "inputs", folder / "here", folder / "place" / "out"
        for path in (self.inputs, self.here, folder / "temporary", folder / "place"):
            path.mkdir()
        broken = self.inputs / Path(UNLOADABLE).name
        broken.mkdir()
        (broken / "config.json").write_text("{}", encoding="utf-8")
        (broken / "model.safetensors").write_bytes(b"")

    def run(self, *arguments: object) -> Done:
        """``sku ARGUMENTS`` in this process."""
        self._read()
        before, sys.argv = sys.argv, ["sku", *map(str, arguments)]
        code: Any = 0
        old = signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(SECONDS)
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, old)
            sys.argv = before
        assert isinstance(code, int), code
        return Done(code, *self._read())

    def refuses(self, *arguments: object, words: str = "") -> None:
        """Checks that a command refuses its input: exit code 2, one line with ``words``, nothing written or changed.

        Args:
            *arguments: Of the command.
            words: Stand in the line: what is wrong, or where.
        """
        before = _content(self._folder)
        done = self.run(*arguments)
        assert done.code == 2, (done.code, done.out, done.err)
        assert done.out == ""
        assert "Traceback" not in done.err
        lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, done.err
        # Besides: the headline of a run and its progress bars.
        others = [line for line in done.err.splitlines() if line.strip() and line not in lines]
        assert [line for line in others if not line.startswith("recipe ") and " left " not in line] == [], done.err
        assert obeyed(lines[0]) == []
        assert len(lines[0]) < LONGEST, len(lines[0])
        assert words in lines[0], (words, lines[0])
        after = _content(self._folder)
        assert after == before, {path for path in after.keys() | before.keys() if after.get(path) != before.get(path)}


LONGEST = 1000
"""Characters of an error line: what a user can read, whatever was in the file."""


class TookTooLongError(BaseException):
    """No ``Exception``: no reader may take it for a fault of the file."""


def _too_long(_signal: int, _frame: object) -> None:
    raise TookTooLongError(f"the command took more than {SECONDS} s")


def obeyed(text: str) -> list[str]:
    """Characters that a terminal may obey, or that are no text."""
    return [one for one in text if unicodedata.category(one) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


def _content(folder: Path) -> dict[str, tuple[int, str]]:
    """Path -> mode and SHA-256 of everything below a folder; a pipe is not opened, a link not followed."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            status = path.lstat()
            text = b""
            if stat.S_ISREG(status.st_mode):
                text = path.read_bytes()
            elif stat.S_ISLNK(status.st_mode):
                text = os.fsencode(path.readlink())
            found[str(path)] = status.st_mode, hashlib.sha256(text).hexdigest()
    return found


@functools.cache
def built_command() -> Callable[[], Any]:
    """``app``, built once: typer builds it anew for each call, which takes half of the time of a case."""
    return typer.main.get_command(app)


@pytest.fixture
def battery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Battery]:
    """Commands that stand in a folder of their own; what they silence for their process speaks again afterwards."""

    def read() -> tuple[str, str]:
        out, err = capfd.readouterr()
        return out, err

    for name in ("TOKENIZERS_PARALLELISM", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1" if name == "TQDM_DISABLE" else "false")
    monkeypatch.setattr("sku.__main__.app", built_command())
    made = Battery(tmp_path, read)
    monkeypatch.chdir(made.here)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    verbosity = transformers.utils.logging.get_verbosity(), datasets.utils.logging.get_verbosity()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield made
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity(verbosity[0])
    datasets.utils.logging.set_verbosity(verbosity[1])
    transformers.utils.logging.enable_progress_bar()
    datasets.enable_progress_bars()
