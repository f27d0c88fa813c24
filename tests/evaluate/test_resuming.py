"""A run that is killed or fails while it generates goes on with what was saved, and ends as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import stat
from pathlib import Path
from typing import Any, Literal

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sku.config import EvaluateConfig
from sku.data.examples import ForgetExample, ForgetRetainData, RetainExample
from sku.data.load import load_forget_retain
from sku.evaluate.generation.writing import ReplyWriter
from sku.evaluate.records import (
    FLUENCY_FILE,
    GENERATIONS_FILE,
    OUTCOMES_FILE,
    PERPLEXITY_FILE,
    STARTS_FILE,
    ExampleLoss,
    PartialFile,
)
from sku.evaluate.run import evaluate

FILES = (
    GENERATIONS_FILE,
    PERPLEXITY_FILE,
    FLUENCY_FILE,
    OUTCOMES_FILE,
    STARTS_FILE,
    "similarity.jsonl",
    "evaluation.json",
)
PARTIAL = f".{GENERATIONS_FILE}.partial"
PREFILLS: tuple[int | Literal["affirmative", "answer"], ...] = (3, "affirmative", "answer")
CONFIG = EvaluateConfig(
    prompts=4, retain_prompts=4, batch_size=4, max_new_tokens=8, samples=3, prefill_tokens=PREFILLS
)


@pytest.fixture
def data() -> ForgetRetainData:
    return ForgetRetainData(
        forget_train=tuple(ForgetExample(prompt=f"do thing {n}", answer=f"first take {n}") for n in range(4)),
        forget_test=tuple(ForgetExample(prompt=f"do other {n}", answer=f"then take {n}") for n in range(2)),
        retain_train=(),
        retain_validation=(),
        retain_test=tuple(RetainExample(prompt=f"say {n}", answer=f"{n} it is") for n in range(4)),
    )


class StopRunError(Exception):
    """What interrupts a run here."""


@pytest.mark.integration
@pytest.mark.parametrize(("stage", "at"), [("replies", 8), ("samples", 4), ("prefill", 4)])
def test_a_failed_run_goes_on_with_the_missing_batches(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    data: ForgetRetainData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    at: int,
) -> None:
    asked: list[str] = []
    real = ReplyWriter.answer

    def counting(self: Any, requests: Any, decoding: Any) -> Any:
        asked.extend(request.id for request in requests)
        return real(self, requests, decoding)

    monkeypatch.setattr(ReplyWriter, "answer", counting)

    def stop(name: str, done: int, total: int) -> None:
        if (name, done) == (stage, at):
            raise StopRunError

    def run(name: str, **options: Any) -> Any:
        # The base itself: its prefills begin with its own replies.
        return evaluate(
            tiny_model,
            tiny_tokenizer,
            data,
            config=CONFIG,
            base_model=tiny_model,
            output_dir=tmp_path / name,
            **options,
        )

    whole = run("whole")
    assert whole.setup.starts["own"] > 0
    everything = list(asked)
    asked.clear()
    with pytest.raises(StopRunError):
        run("cut", progress=stop)
    first = list(asked)
    partial = tmp_path / "cut" / PARTIAL
    assert stat.S_IMODE(partial.stat().st_mode) == 0o600
    saved = [json.loads(line)["id"] for line in partial.read_text().splitlines()[1:]]
    assert 0 < len(saved) <= len(first) < len(everything)
    with partial.open("a") as file:
        file.write('{"id": "torn')
    asked.clear()
    assert run("cut") == whole
    assert asked == everything[len(saved) :]
    for file_name in FILES:
        assert (tmp_path / "cut" / file_name).read_bytes() == (tmp_path / "whole" / file_name).read_bytes()
    assert {path.name for path in (tmp_path / "cut").iterdir()} == set(FILES)


def test_a_partial_file_keeps_whole_rows_only(tmp_path: Path) -> None:
    rows = [ExampleLoss(id=f"r{number}", split="forget_test", nll=1.5, tokens=number) for number in range(5)]
    header = {"model": "m"}
    partial = PartialFile(tmp_path / "x.jsonl", header, ExampleLoss)
    assert partial.recover() == []
    partial.append(rows[:2])
    partial.append(rows[2:3])
    assert partial.recover() == rows[:3]
    whole = partial.path.read_text()
    partial.path.write_text(whole[:-5])
    assert partial.recover() == rows[:2]
    partial.append(rows[1:4])
    assert partial.recover() == rows[:4], "a row that was made again counts once"
    lines = partial.path.read_text().splitlines(keepends=True)
    partial.path.write_text("".join([*lines[:2], "[]\n", *lines[3:]]))
    assert partial.recover() == rows[:1]
    assert PartialFile(tmp_path / "x.jsonl", {"model": "n"}, ExampleLoss).recover() == []
    assert partial.recover() == []
    partial.path.write_bytes(b"\xff\n")
    assert partial.recover() == []
    partial.remove()
    partial.remove()
    assert not list(tmp_path.iterdir())


def kill(stage: str, done: int, total: int) -> None:
    if (stage, done) == ("samples", 8):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.integration
def test_a_killed_process_loses_one_batch_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork of this one, which has imported everything."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    config = EvaluateConfig(prompts=3, retain_prompts=3, batch_size=4, max_new_tokens=12, samples=2)
    world = load_forget_retain()
    child = os.fork()
    if child == 0:
        try:
            evaluate("embedded", None, world, config=config, output_dir=tmp_path / "cut", progress=kill)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    partial = tmp_path / "cut" / PARTIAL
    saved = len(partial.read_text().splitlines()) - 1
    counts: dict[str, int] = {}

    def note(stage: str, done: int, total: int) -> None:
        counts.setdefault(stage, done)

    resumed = evaluate("embedded", None, world, config=config, output_dir=tmp_path / "cut", progress=note)
    assert saved == 9 + 8, "all greedy free replies and two batches of drawn ones"
    assert (counts["samples"], "replies" in counts) == (12, False)
    assert resumed == evaluate("embedded", None, world, config=config, output_dir=tmp_path / "whole")
    for name in FILES:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
