"""A killed negation leaves nothing that loads, and goes on to the same bits."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from conftest import ModelMaker
from negate.conftest import disturbed
from sku.errors import OutputError
from sku.negate.streaming import NegatedFolder, negate_folders

KILLS = 15
# Forks from one process, so that a kill costs no import of torch.
SERVER = """
import os, signal, sys, time
import torch
from sku.negate import arithmetic
from sku.negate.streaming import negate_folders
arithmetic.BLOCK_ELEMENTS = 200
base, bad, out = sys.argv[1:]
for line in sys.stdin:
    child = os.fork()
    if not child:
        os.dup2(2, 1)
        negate_folders(base, bad, out, 0.5, threads=2, resume=True, progress=lambda done, total: time.sleep(1e-5))
        os._exit(0)
    time.sleep(float(line))
    os.kill(child, signal.SIGKILL)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture
def inputs(make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A folder with a sharded base and its bad model."""
    base = make_model()
    for name, model in (("base", base), ("bad", disturbed(base))):
        model.save_pretrained(tmp_path / "in" / name, max_shard_size="30KB")
        tokenizer.save_pretrained(tmp_path / "in" / name)
    return tmp_path / "in"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def hidden(folder: Path) -> list[Path]:
    return sorted(folder.glob(".out.partial-*"))


@pytest.mark.integration
def test_killed_at_random_points(inputs: Path, tmp_path: Path) -> None:
    out, expected = tmp_path / "run" / "out", tmp_path / "expected"
    negate_folders(inputs / "base", inputs / "bad", expected, 0.5)
    chance = random.Random(0)
    resumed: set[int] = set()
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SERVER, str(inputs / "base"), str(inputs / "bad"), str(out)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as server:  # fmt: skip
        assert server.stdin is not None
        assert server.stdout is not None
        killed = whole = 0
        longest = 0.05
        while not whole or killed < KILLS:
            server.stdin.write(f"{chance.uniform(0, longest)}\n")
            killed += int(server.stdout.readline()) != 0
            if out.exists():  # Also where it was killed after the last rename.
                assert contents(out) == contents(expected)
                shutil.rmtree(out)
                whole += 1
            for folder in hidden(out.parent):
                resumed.add(len(list((folder / "model").glob("*.safetensors"))))
                # Whole it can be for the moment between its last file and its new name.
                with suppress(OSError, ValueError):
                    AutoModelForCausalLM.from_pretrained(folder / "model")
                    assert contents(folder / "model") == contents(expected)
            longest *= 1.5 if killed > 2 * KILLS else 1
        server.stdin.close()
    assert len(resumed) > 1, "some were killed between two files"


def interrupted(inputs: Path, out: Path, share: float, **options: Any) -> None:
    """Stops as Ctrl-C would, after a share of the bytes."""

    def stop(done: int, total: int) -> None:
        if done >= share * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        negate_folders(inputs / "base", inputs / "bad", out, progress=stop, **options)


def negated(inputs: Path, out: Path, **options: Any) -> NegatedFolder:
    return negate_folders(inputs / "base", inputs / "bad", out, **options)


def test_finished_files_are_kept_and_the_rest_is_made(inputs: Path, tmp_path: Path) -> None:
    whole = negated(inputs, tmp_path / "whole")
    out = tmp_path / "out"
    interrupted(inputs, out, 0.6)
    [partial] = hidden(tmp_path)
    assert partial.stat().st_mode & 0o777 == 0o700
    finished = {path.name: path.stat().st_mtime_ns for path in (partial / "model").glob("*.safetensors")}
    assert 0 < len(finished) < len(list((inputs / "base").glob("*.safetensors")))
    again = negated(inputs, out, resume=True)
    assert again.resumed_files == len(finished)
    assert again.record == whole.record, "the sums of the finished files are kept too"
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished
    assert contents(out) == contents(tmp_path / "whole")
    assert hidden(tmp_path) == []


def test_other_inputs_are_not_gone_on_with(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(inputs, out, 0.6)
    with pytest.raises(OutputError, match=r"was begun with other inputs or options \(alpha\)"):
        negated(inputs, out, alpha=0.5, resume=True)
    os.utime(sorted((inputs / "bad").glob("*.safetensors"))[0])
    with pytest.raises(OutputError, match=r"other inputs or options \(weights\)"):
        negated(inputs, out, resume=True)
    assert len(hidden(tmp_path)) == 1
    assert negated(inputs, out).resumed_files == 0
    assert hidden(tmp_path) == [], "without resume it is removed"


def test_what_a_kill_at_the_very_end_left_is_not_trusted(inputs: Path, tmp_path: Path) -> None:
    """Behind the last rename the list of finished files is left without the files; before it, a config that loads."""
    out = tmp_path / "out"
    negated(inputs, tmp_path / "whole")
    interrupted(inputs, out, 1.0)
    [partial] = hidden(tmp_path)
    (partial / "model" / "config.json").write_text("{}")
    kept = sorted((partial / "model").glob("*.safetensors"))
    kept[0].unlink()

    def look(done: int, total: int) -> None:
        assert not (partial / "model" / "config.json").exists()

    again = negated(inputs, out, resume=True, progress=look)
    assert again.resumed_files == len(kept) - 1
    assert contents(out) == contents(tmp_path / "whole")


def test_two_at_once_are_refused(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused: list[pytest.ExceptionInfo[OutputError]] = []

    def again(done: int, total: int) -> None:
        for resume in (False, True) if done == total else ():
            with pytest.raises(OutputError, match="another process is writing") as caught:
                negated(inputs, out, resume=resume)
            refused.append(caught)

    negated(inputs, out, progress=again)
    assert len(refused) == 2
    assert out.exists()
