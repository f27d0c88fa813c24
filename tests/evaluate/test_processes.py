"""Two processes share an evaluation and come to the result of one; a failure reaches them all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sku.config import load_recipe
from sku.errors import EvaluationError
from sku.evaluate.generation import in_batches, plan_batches
from sku.pipeline.evaluate import run_evaluation
from sku.processes import ALONE

SETTINGS = [
    "evaluate.prompts=3", "evaluate.retain_prompts=4", "evaluate.batch_size=4", "evaluate.max_new_tokens=12",
    "evaluate.samples=2", "evaluate.attacks=[]",
]  # fmt: skip
FAILING = """
import os

import torch

from sku.errors import EvaluationError, SkuError
from sku.processes import current_processes

processes = current_processes()
assert processes.run_on_rank0(lambda: processes.rank) == 0
assert processes.gather(lambda: [processes.rank] * 2) == [0, 0, 1, 1]

def fail(rank):
    if processes.rank == rank:
        raise EvaluationError("it broke")
    return [processes.rank]

for stage, rank in ((processes.gather, 1), (processes.gather, 0), (processes.run_on_rank0, 0)):
    try:
        stage(lambda: fail(rank))
    except SkuError as error:
        os.write(1, f"{processes.rank}: {error}\\n".encode())  # In one piece: both write to the same pipe.
torch.distributed.destroy_process_group()
"""


def launched(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Two processes. On CPUs ``accelerate launch`` starts one only unless there is MPI; ``torchrun`` starts both."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)


@pytest.mark.integration
def test_two_processes_come_to_the_result_of_one(tmp_path: Path) -> None:
    options = [f"--set={setting}" for setting in SETTINGS]
    two = launched(
        "-m", "sku", "evaluate", "embedded", "embedded-paper", "--json", *options, "--out", str(tmp_path / "two")
    )
    assert two.returncode == 0, two.stderr[-3000:]
    comparison = run_evaluation(load_recipe("embedded-paper", SETTINGS), "embedded", tmp_path / "one").comparison
    said = json.loads(two.stdout)
    alone = {"base": comparison.base.to_dict(), "model": comparison.unlearned.to_dict(), "notes": comparison.notes}
    alone["verdict"] = comparison.verdict.to_dict()
    assert said == json.loads(json.dumps(alone)), "said once, by the first process"
    assert said["base"]["samples"]["forget_test"]["harmful"]["total"] == 6
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert files == sorted(path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*.*"))
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path


@pytest.mark.integration
def test_a_failure_reaches_the_other_process(tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    found = launched(str(script))
    assert found.returncode == 0, found.stderr[-3000:]
    assert sorted(found.stdout.splitlines()) == [
        "0: it broke", "0: it broke", "0: process 1 of 2 failed: it broke",
        "1: it broke", "1: process 0 of 2 failed: it broke", "1: process 0 of 2 failed: it broke",
    ]  # fmt: skip


def test_finished_results_are_kept_and_batches_stay_the_same() -> None:
    lengths = [3, 9, 5, 5, 1, 20]
    assert plan_batches(lengths, batch_size=2) == [[5, 1], [2, 3], [0, 4]]
    seen: list[list[int]] = []
    kept: list[list[int]] = []
    told: list[tuple[int, ...]] = []

    def run(batch: list[int]) -> list[int]:
        seen.append(batch)
        return [lengths[index] * 10 for index in batch]

    found = in_batches(
        lengths, run, batch_size=2, processes=ALONE, finished={5: 200, 1: 90, 2: 50}, keep=kept.append,
        progress=lambda *counts: told.append(counts),
    )  # fmt: skip
    assert found == [30, 90, 50, 50, 10, 200]
    assert seen == [[2, 3], [0, 4]]
    assert kept == [[50, 50], [30, 10]]
    assert told == [(4, 6), (6, 6)]


def test_groups_stay_together_where_their_longest_example_stands() -> None:
    lengths, groups = [3, 9, 5, 5, 1, 20], ["a", "b", "c", "b", "a", "c"]
    assert plan_batches(lengths, batch_size=3, groups=groups) == [[5, 2, 1], [3, 0, 4]]
    assert plan_batches(lengths, batch_size=3, groups=range(6)) == plan_batches(lengths, batch_size=3)
    assert plan_batches(lengths, batch_size=3, groups=groups, max_padded_tokens=20) == [[5], [2], [1, 3], [0, 4]]


def test_out_of_memory_halves_the_batch_and_a_single_example_that_does_not_fit_is_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sizes: list[int] = []

    def run(batch: list[int]) -> list[int]:
        sizes.append(len(batch))
        if len(batch) > memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch

    memory = 2
    assert in_batches([1] * 8, run, batch_size=8) == [*range(8)]
    assert sizes == [8, 4, 2, 2, 2, 2]
    assert len(caplog.records) == 1, "said once"
    memory = 0
    with pytest.raises(EvaluationError, match="single example of 9 tokens"):
        in_batches([3, 9], run, batch_size=2)
